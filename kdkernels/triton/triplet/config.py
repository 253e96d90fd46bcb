# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of triplet: data, chosen by one pure function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kdkernels.triton.common.dots import pick_precision
from kdkernels.triton.common.launch import MOST_SPLITS, Arch, Tile, cdiv, fill_device, split_length

SUMMED = 4096  # losses that are added at a time
SORTED = 1024  # entries that a program makes


def row_columns(D: int) -> tuple[int, int]:
    """(columns of one row that a program makes at a time, contributions to it that are loaded
    together)"""
    columns = min(max(triton.next_power_of_2(D), 16), 512)
    return columns, min(2048 // columns, 16)


@dataclass(frozen=True)
class TripletConfig:
    tile: Tile  # of anchors and references
    splits: int  # of the references
    split_length: int  # references in a split; a multiple of tile.n
    precision: str  # of the products
    differences: bool  # whether close rows are ranked by them


def pick_config(
    B: int, M: int, *, dtype: torch.dtype, arch: Arch, fp32_matmul: str
) -> TripletConfig:
    """The configuration of B anchors that look through M references.

    `fp32_matmul` is `kdkernels._gpu.fp32_matmul()`. Ranking takes differences of products:
    single tf32 operands would lose near neighbours, so fp32 features never get less than tf32x3.
    """
    precisions = pick_precision(dtype, arch, fp32_matmul)
    precision = precisions.factors if dtype == torch.float32 else precisions.features
    tile = _tile(dtype, arch, precision)
    splits = fill_device(arch, cdiv(B, tile.m), min(cdiv(M, tile.n), MOST_SPLITS))
    length = split_length(M, splits, tile.n)
    # the masks of a search and another loop over the features are more than AMD's scalar registers
    differences = arch.vendor != "hip"
    return TripletConfig(tile, max(1, cdiv(M, length)), length, precision, differences)


def _tile(dtype: torch.dtype, arch: Arch, precision: str) -> Tile:
    if arch.vendor == "interpreter":  # small enough that samples have several tiles
        return Tile(32, 32, 64, 4, 1)
    stages = 2 if arch.vendor == "hip" else 3
    if dtype == torch.float32:
        if precision == "ieee" and arch.vendor == "cuda":
            # without tensor cores every operand of a step is held in registers: a short step
            return Tile(64, 64, 16, 8, stages)
        step = 16 if arch.narrow else 32
        return Tile(128 if arch.vendor == "hip" else 64, 64, step, 8, stages)
    # Small tiles: the loop over differences holds the scales of both sides beside its distances,
    # and AMD devices have few scalar registers.
    return Tile(64, 64, 32, 8, stages) if arch.vendor == "hip" else Tile(128, 32, 64, 8, stages)
