# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of triplet: data, chosen by one pure function."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdkernels.triton.common.dots import pick_precision
from kdkernels.triton.common.launch import Arch, cdiv

ENTRIES = 16  # pulls on one row that are loaded together
MOST_SPLITS = 64


@dataclass(frozen=True)
class TripletConfig:
    """A tile of m anchors and n references, contracted in steps of k, and its compilation."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    splits: int  # of the references
    split_length: int  # references in a split; a multiple of n
    precision: str  # of the products


def pick_config(
    B: int, M: int, *, dtype: torch.dtype, arch: Arch, fp32_matmul: str
) -> TripletConfig:
    """The configuration of B anchors that look through M references.

    `fp32_matmul` is `torch.get_float32_matmul_precision()`. Ranking takes differences of products:
    single tf32 operands would lose near neighbours, so fp32 features never get less than tf32x3.
    """
    precisions = pick_precision(dtype, arch, fp32_matmul)
    precision = precisions.factors if dtype == torch.float32 else precisions.features
    m, n, k, num_warps, num_stages = _tile(dtype, arch, precision)
    blocks = max(1, cdiv(M, n))
    splits = min(cdiv(2 * arch.processors, max(1, cdiv(B, m))), blocks, MOST_SPLITS)
    length = cdiv(blocks, splits) * n
    return TripletConfig(m, n, k, num_warps, num_stages, max(1, cdiv(M, length)), length, precision)


def _tile(dtype: torch.dtype, arch: Arch, precision: str) -> tuple[int, int, int, int, int]:
    """(m, n, k, num_warps, num_stages)"""
    if arch.vendor == "interpreter":  # small enough that samples have several tiles
        return 32, 32, 64, 4, 1
    stages = 2 if arch.vendor == "hip" else 3
    if dtype == torch.float32:
        if precision == "ieee" and arch.vendor == "cuda":
            # without tensor cores every operand of a step is held in registers: a short step
            return 64, 64, 16, 8, stages
        return 128 if arch.vendor == "hip" else 64, 64, 32, 8, stages
    return 128, 64, 64, 8, stages
