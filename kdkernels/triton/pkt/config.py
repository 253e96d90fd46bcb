# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of pkt: data, chosen by one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from kdkernels.triton.common.dots import pick_precision
from kdkernels.triton.common.launch import (
    MOST_SPLITS,
    Arch,
    Tile,
    cdiv,
    fill_device,
    rows_in_l2,
    split_length,
)

# A kernel of single rows takes so many, of which it reads so many columns at a time; one that sums
# over rows takes so many of them at a time; and one that adds up numbers per row, so many.
ROWS, COLUMNS = 8, 128
COLUMN_ROWS = 32
BLOCK = 1024


@dataclass(frozen=True)
class PktConfig:
    tiles: Tile  # rows times rows, of both sides
    product: Tile  # weights times features, of cosine
    gradient: Tile  # weights times differences of rows, of student_t; its m and k divide a tile's
    arch: Arch
    precision: str  # of products of features
    weights: str  # of weights times features
    distances: str  # of products of features whose difference is a distance
    factors: str  # of weights times differences

    def chunk(self, B: int, itemsize: int) -> int:
        """How many rows of weights are made at a time."""
        return min(B, rows_in_l2(self.arch, B * itemsize, self.tiles.m))

    def split(self, rows: int, B: int) -> int:
        """Columns that one program goes through."""
        splits = fill_device(self.arch, cdiv(rows, self.tiles.m), cdiv(B, self.tiles.n))
        return split_length(B, splits, self.tiles.n)

    def split_rows(self, B: int, programs: int) -> tuple[int, int]:
        """(length of a part, number of parts) of a sum over rows."""
        splits = fill_device(self.arch, programs, min(cdiv(B, 2 * COLUMN_ROWS), MOST_SPLITS // 2))
        length = split_length(B, splits, COLUMN_ROWS)
        return length, cdiv(B, length)

    def gradient_splits(self, rows: int, columns: int, contraction: int) -> int:
        """Of the contraction of a gradient of student_t, each of two steps or more."""
        most = min(contraction // (2 * self.gradient.k), MOST_SPLITS)
        return fill_device(self.arch, self.gradient.count(rows, columns), most)


@cache
def pick_config(*, dtype: torch.dtype, arch: Arch, fp32_matmul: str, cosine: bool) -> PktConfig:
    """`fp32_matmul` is `kdkernels._gpu.fp32_matmul()`."""
    precision = pick_precision(dtype, arch, fp32_matmul)
    tiles, product, gradient = _tiles(dtype, arch, precision.features, cosine)
    return PktConfig(
        tiles, product, gradient, arch, precision.features, precision.weights,
        distances=precision.factors if dtype == torch.float32 else precision.features,
        factors=precision.factors,
    )  # fmt: skip


def _tiles(dtype: torch.dtype, arch: Arch, precision: str, cosine: bool) -> tuple[Tile, Tile, Tile]:
    if arch.vendor == "interpreter":  # small enough that samples have several tiles
        return (Tile(32, 32, 32, 4, 1),) * 3
    stages = 2 if arch.vendor == "hip" else 3
    if dtype == torch.float32:
        # without tensor cores every operand of a step is held in registers: a short step
        step = 16 if precision == "ieee" and arch.vendor == "cuda" else 32
        product = Tile(64, 64, step, 8, stages)
        return Tile(64, 32, step, 8, 1 if arch.vendor == "hip" else stages), product, product
    # of student_t a program holds the distances too
    tiles = Tile(64, 64 if cosine else 32, 32, 8, stages)
    if arch.vendor == "hip":  # loads ahead of their use take registers
        tiles = Tile(64, 32, 32, 8, 1)
    return tiles, Tile(128, 64, 32, 8, stages), Tile(64, 64, 32, 4, 2 if arch.narrow else stages)
