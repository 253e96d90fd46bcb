# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of relational_kl: data, chosen by one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from kdkernels.triton.common.dots import pick_precision
from kdkernels.triton.common.launch import Arch, Tile, rows_in_l2


@dataclass(frozen=True)
class RelationalKLConfig:
    logits: Tile  # rows times keys on both sides, with weights or derivatives in the epilogue
    product: Tile  # weights or derivatives times keys or rows; logits.n is a multiple of product.k
    arch: Arch
    merge: tuple[int, int]  # rows and tiles of a row that a program merges at a time
    of_logits: str  # precision of rows times keys
    of_weights: str  # precision of weights or derivatives times keys or rows
    weight_dtype: torch.dtype  # of weights, which are at most 1
    derivative_dtype: torch.dtype

    def chunk(self, count: int, row_bytes: int, tile: int) -> int:
        """How many of `count` rows (or columns) of weights are made at a time."""
        return min(count, rows_in_l2(self.arch, row_bytes, tile))


@cache
def pick_config(B: int, *, dtype: torch.dtype, arch: Arch, fp32_matmul: str) -> RelationalKLConfig:
    """The configuration of a call on B rows, for keys of a dtype.

    `fp32_matmul` is `kdkernels._gpu.fp32_matmul()`.
    """
    precision = pick_precision(dtype, arch, fp32_matmul)
    logits, product = _tiles(B, dtype, arch, precision.features)
    return RelationalKLConfig(
        logits=logits,
        product=product,
        merge=(8, 4) if arch.vendor == "interpreter" else (8, 128),
        arch=arch,
        of_logits=precision.features,
        of_weights=precision.weights,
        weight_dtype=dtype,
        # fp16 could not hold what dout makes of a derivative
        derivative_dtype=torch.float32 if dtype == torch.float16 else dtype,
    )


def _tiles(B: int, dtype: torch.dtype, arch: Arch, precision: str) -> tuple[Tile, Tile]:
    if arch.vendor == "interpreter":  # small enough that samples have several tiles
        return Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)
    stages = 2
    if dtype == torch.float32:
        if precision == "ieee" and arch.vendor == "cuda":
            # without tensor cores every operand of a step is held in registers: a short step,
            # and on GPUs for graphics no second stage, so that two programs share a processor
            logits = Tile(64, 64, 16, 8, 1 if arch.narrow else stages)
            return logits, Tile(64, 64, 16, 8, stages)
        return Tile(64, 64, 32, 8, stages), Tile(64, 64, 32, 8, stages)
    rows, warps = (64, 4) if B <= 64 else (128, 8)
    return Tile(rows, 64, 32, warps, stages), Tile(rows, 64, 32, warps, stages)
