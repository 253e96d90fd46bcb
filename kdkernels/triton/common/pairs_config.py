# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the losses over many pairs of labelled rows: data, chosen by one pure
function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from kdkernels.triton.common.dots import Precision, pick_precision
from kdkernels.triton.common.launch import MOST_SPLITS, Arch, Tile, cdiv, fill_device
from kdkernels.triton.common.prepared import REMEMBERED

# Numbers of a buffer of distances or of weights, of which a call holds three at most.
BUFFER = 1 << 24


@dataclass(frozen=True)
class LabelledConfig:
    distances: Tile  # of anchors and references
    gradient: Tile  # of rows and their columns, contracted over the other rows of the pairs
    chunk: int  # anchors whose distances are held at once
    positives: int  # of an anchor, compared at once with
    negatives: int  # so many negatives of it
    distance_precision: str
    gradient_precision: str
    arch: Arch

    def splits(self, rows: int, columns: int, contraction: int) -> int:
        """Of the contraction of a gradient, each of two steps or more."""
        most = min(contraction // (2 * self.gradient.k), MOST_SPLITS)
        return fill_device(self.arch, self.gradient.count(rows, columns), most)


@lru_cache(REMEMBERED)
def pick_config(
    B: int, M: int, *, dtype: torch.dtype, arch: Arch, fp32_matmul: str, sides: int = 1
) -> LabelledConfig:
    """The configuration of B anchors and M references.

    `sides` is how many tiles of distances a program holds at once, which narrows them.
    `fp32_matmul` is `kdkernels._gpu.fp32_matmul()`. Distances and gradients are differences of
    products: single tf32 operands would lose those of near rows, so fp32 features never get less
    than tf32x3.
    """
    precisions = pick_precision(dtype, arch, fp32_matmul)
    precision = precisions.factors if dtype == torch.float32 else precisions.features
    distances, gradient, buffer = _tiles(dtype, arch, precisions)
    if sides == 2:
        distances = _half(distances, gradient)
        if arch.narrow:
            distances = replace(distances, num_stages=2)
    fit = max(1, buffer // max(M, 1) // distances.m) * distances.m
    interpreted = arch.vendor == "interpreter"
    return LabelledConfig(
        distances=distances,
        gradient=gradient,
        chunk=min(fit, cdiv(B, distances.m) * distances.m),
        positives=16 if interpreted else 8,
        negatives=64 if interpreted else 256,
        distance_precision=precision,
        gradient_precision=precisions.factors,
        arch=arch,
    )


def _half(tile: Tile, gradient: Tile) -> Tile:
    """A tile of half as many distances, in which whole tiles of a gradient fit."""
    if tile.m >= 2 * gradient.m:
        return replace(tile, m=tile.m // 2)
    return replace(tile, n=tile.n // 2, num_warps=tile.num_warps // 2)


def _tiles(dtype: torch.dtype, arch: Arch, precisions: Precision) -> tuple[Tile, Tile, int]:
    """(distances, gradient, numbers of a buffer)"""
    if arch.vendor == "interpreter":  # small enough that samples have several tiles and chunks
        return Tile(32, 32, 64, 4, 1), Tile(32, 32, 16, 4, 1), 1 << 11
    stages = 2 if arch.vendor == "hip" else 3
    if dtype == torch.float32:
        # without tensor cores every operand of a step is held in registers: a short step
        step = 16 if precisions.factors == "ieee" and arch.vendor == "cuda" else 32
        tile = Tile(64, 64, step, 8, stages)
        return tile, tile, BUFFER
    gradient = Tile(64, 64, 32, 4, 2 if arch.narrow else stages)
    return Tile(128, 64, 64, 8, stages), gradient, BUFFER
