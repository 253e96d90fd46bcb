# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of gram_mse: data, chosen by one pure function."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdkernels.triton.common.dots import Precision, pick_precision
from kdkernels.triton.common.launch import MOST_SPLITS, Arch, Tile, cdiv, fill_device, rows_in_l2


@dataclass(frozen=True)
class GramMseConfig:
    product: Tile  # Grams and factors; square, because their tiles are mirrored
    splits: int  # of the contraction of a product
    pair: Tile  # a tile of both Grams, streamed; square
    pair_weights: Tile  # a tile of both Grams and of the weights of a gradient, streamed
    weighted: Tile  # weights, made from resident Grams or loaded, times features
    row: Tile  # features times a factor, reduced to row sums
    factored: Tile  # features times factors, added up to a gradient
    chunk: int  # rows of both Grams per launch, streamed; a multiple of pair.m
    weighted_splits: int  # of the contraction of a chunk of weights with all later rows
    precision: Precision


ELEMENTS = 1024  # per program of an element-wise kernel


def pick_config(
    G: int,
    B: int,
    D_s: int,
    D_t: int,
    *,
    algorithm: str,
    dtype: torch.dtype,
    arch: Arch,
    fp32_matmul: str,
) -> GramMseConfig:
    """The configuration of a call on G groups of B rows.

    `fp32_matmul` is `kdkernels._gpu.fp32_matmul()`.
    """
    precision = pick_precision(dtype, arch, fp32_matmul)
    product, pair, pair_weights, weighted, row, factored = _tiles(algorithm, dtype, arch, precision)

    def splits(tiles: int, contraction: int, step: int) -> int:
        return fill_device(arch, tiles, min(contraction // (4 * step), MOST_SPLITS))

    if algorithm == "factored":
        n_s, n_t = cdiv(D_s, product.m), cdiv(D_t, product.m)
        tiles, contraction = (n_s * (n_s + 1) + n_t * (n_t + 1)) // 2 + n_s * n_t, B
    else:
        n = cdiv(B, product.m)
        tiles, contraction = n * (n + 1), max(D_s, D_t)
    weight_bytes = 2 if dtype == torch.bfloat16 else 4
    chunk = min(rows_in_l2(arch, G * B * weight_bytes, pair.m), 16 * pair.m)
    chunk_tiles = G * weighted.count(chunk, max(D_s, D_t))
    return GramMseConfig(
        product=product,
        splits=splits(G * tiles, contraction, product.k),
        pair=pair,
        pair_weights=pair_weights,
        weighted=weighted,
        row=row,
        factored=factored,
        chunk=chunk,
        weighted_splits=splits(chunk_tiles, B, weighted.k),
        precision=precision,
    )


def _tiles(
    algorithm: str, dtype: torch.dtype, arch: Arch, precision: Precision
) -> tuple[Tile, ...]:
    """(product, pair, pair_weights, weighted, row, factored)."""
    if (
        arch.vendor == "interpreter"
    ):  # large enough to be quick there, small enough that samples have several tiles
        tile, small = Tile(32, 32, 64, 4, 1), Tile(32, 32, 16, 4, 1)
        return tile, tile, Tile(32, 64, 64, 4, 1), Tile(32, 64, 32, 4, 1), small, small
    stages = 2 if arch.vendor == "hip" else 3
    if dtype == torch.float32:
        # without tensor cores every operand of a step is held in registers: a short step
        step = 16 if precision.features == "ieee" and arch.vendor == "cuda" else 32
        wide = 16 if precision.factors == "ieee" and arch.vendor == "cuda" else 32
        return (
            Tile(64, 64, 32, 8, stages),
            Tile(64, 64, step, 8, stages),
            Tile(64, 64, step, 8, stages),
            Tile(64, 64, step, 8, stages),
            Tile(64, 64, wide, 8, stages),
            Tile(64, 64, wide, 8, stages),
        )
    # a step of weighted rows in fp16 holds fp32 copies of both, one of made weights two fp32 Grams
    product = 32 if algorithm == "factored" and dtype == torch.float16 else 64
    weighted = 32 if algorithm == "resident" else 64
    # on Blackwell fewer warps leave numbers on the stack
    wide = arch.name.startswith("sm_10") and (algorithm == "resident" or dtype == torch.float16)
    return (
        Tile(64, 64, product, 8 if wide else 4, stages),
        Tile(128, 128, 32 if arch.narrow else 64, 8, stages),
        Tile(128, 64, 64, 8, stages),
        Tile(64, 128, weighted, 4, stages),
        Tile(64, 64, 32, 4, stages),
        Tile(64, 64, 32, 8, 2),
    )
