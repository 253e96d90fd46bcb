# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of lsh_bce: data, chosen by one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kdkernels.triton.common.dots import pick_precision
from kdkernels.triton.common.launch import Arch, Tile, rows_in_l2
from kdkernels.triton.common.prepared import REMEMBERED

ELEMENTS = 1024  # per program of an element-wise kernel
# Rows of which one program adds up the losses, and tiles of which it adds those at once.
LOSSES, PARTS = 32, 32


@dataclass(frozen=True, eq=False)  # `pick_config` makes each once
class LshBceConfig:
    project: Tile  # rows of features times directions, with the cross-entropy in the epilogue
    product: Tile  # derivatives of projections times features or directions
    arch: Arch
    precision: str  # of projections
    weights: str  # of derivatives times features or directions

    def chunk(self, count: int, row_bytes: int, tile: int) -> int:
        """How many of `count` rows (or columns) of derivatives are made at a time."""
        return min(count, rows_in_l2(self.arch, row_bytes, tile))


@lru_cache(REMEMBERED)
def pick_config(B: int, *, dtype: torch.dtype, arch: Arch, fp32_matmul: str) -> LshBceConfig:
    """The configuration of a call on B rows.

    `fp32_matmul` is `kdkernels._gpu.fp32_matmul()`.
    """
    precision = pick_precision(dtype, arch, fp32_matmul)
    project, product = _tiles(B, dtype, arch, precision.features)
    return LshBceConfig(project, product, arch, precision.features, precision.weights)


def _tiles(B: int, dtype: torch.dtype, arch: Arch, precision: str) -> tuple[Tile, Tile]:
    if arch.vendor == "interpreter":  # small enough that samples have several tiles
        return Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)
    stages = 2 if arch.vendor == "hip" else 3
    if dtype == torch.float32:
        # without tensor cores every operand of a step is held in registers: a short step
        step = 16 if precision == "ieee" and arch.vendor == "cuda" else 32
        project = Tile(64, 64, step, 8, 2 if arch.narrow else stages)
        return project, Tile(64, 64, step, 8, stages)
    rows, warps = (64, 4) if B <= 64 else (128, 8)
    columns = 64 if arch.vendor == "hip" else 128
    step = 32 if arch.narrow else 64
    return Tile(rows, 64, step, warps, stages), Tile(rows, columns, 64, warps, stages)
