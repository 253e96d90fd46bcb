# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of pairwise: data, chosen by one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kdkernels.triton.common.dots import Precision, pick_precision
from kdkernels.triton.common.launch import Arch, Tile
from kdkernels.triton.common.prepared import REMEMBERED


@dataclass(frozen=True)
class PairwiseConfig:
    values: Tile  # of rows and rows; square, because its tiles are mirrored
    gradient: Tile  # of rows and their columns, contracted over the rows of the other side
    value_precision: str
    gradient_precision: str
    arch: Arch


@lru_cache(REMEMBERED)
def pick_config(
    D: int, *, metric_is_distance: bool, dtype: torch.dtype, arch: Arch, fp32_matmul: str
) -> PairwiseConfig:
    """The configuration of a call on rows of D features.

    `fp32_matmul` is `kdkernels._gpu.fp32_matmul()`. Distances and their gradients are
    differences of products: single tf32 operands would lose those of near rows, so fp32 features
    never get less than tf32x3 there.
    """
    precisions = pick_precision(dtype, arch, fp32_matmul)
    exact = metric_is_distance and dtype == torch.float32
    values, gradient = _tiles(D, dtype, arch, precisions)
    return PairwiseConfig(
        values=values,
        gradient=gradient,
        value_precision=precisions.factors if exact else precisions.features,
        gradient_precision=precisions.factors if metric_is_distance else precisions.weights,
        arch=arch,
    )


def _tiles(D: int, dtype: torch.dtype, arch: Arch, precisions: Precision) -> tuple[Tile, Tile]:
    if arch.vendor == "interpreter":  # small enough that samples have several tiles
        return Tile(32, 32, 64, 4, 1), Tile(32, 32, 16, 4, 1)
    # rows that begin anywhere are loaded number by number, which takes registers
    columns = 64 if D % 16 == 0 else 32
    stages = 2 if arch.vendor == "hip" else 3
    if dtype == torch.float32:
        # without tensor cores every operand of a step is held in registers: a short step
        step = 16 if precisions.factors == "ieee" and arch.vendor == "cuda" else 32
        return Tile(64, 64, step, 8, stages), Tile(64, columns, step, 8, 2)
    if arch.narrow and columns == 32:
        return Tile(64, 64, 32, 8, stages), Tile(32, 32, 32, 4, 2)
    step = 16 if arch.name == "sm_80" else 32  # where the assembler keeps more numbers of a step
    return Tile(64, 64, 64, 8, stages), Tile(64, columns, step, 8, 2)
