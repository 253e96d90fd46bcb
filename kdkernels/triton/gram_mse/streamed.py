# SPDX-License-Identifier: Apache-2.0
"""gram_mse "streamed": tiles of both Grams are made, used and dropped, for B beyond the width of
the features.

Rows are taken in chunks; of the tiles of a chunk only those on or above the diagonal of the whole
matrix are computed, and each serves its rows and its columns. Forward: features are read once per
tile row and column, and a tile leaves a few sums per row and column. Backward: a chunk of weights
is written, then multiplied with the features both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kdkernels.triton.common.launch import cdiv
from kdkernels.triton.common.norms import normalise_gradient
from kdkernels.triton.common.prepared import REMEMBERED, Launch
from kdkernels.triton.common.product import multiply_groups
from kdkernels.triton.gram_mse.call import Call, Curve, new
from kdkernels.triton.gram_mse.streamed_kernels import (
    _gram_mse_bwd_kernel_streamed,
    _gram_mse_fwd_kernel_streamed,
    _gram_mse_gather_kernel,
)

# Rows whose sums one program adds up, and tiles of which it adds those at once.
GATHERED, PARTS = 16, 64


@dataclass(frozen=True)
class _Chunk:
    """Rows of the Grams that one launch computes, with all columns from the first of them on."""

    first: int
    m_blocks: int
    n_blocks: int
    sweep: Launch
    gather: Launch | None


@dataclass(frozen=True)
class _Forward:
    chunks: list[_Chunk]
    statistics: int  # per row
    tiles: int
    sums: torch.dtype


@lru_cache(REMEMBERED)
def _forward(call: Call) -> _Forward:
    G, B, D_s, D_t = call.sizes
    tile, length = call.config.pair, call.config.chunk
    blocks = [
        (first, min(length, B - first), cdiv(min(length, B - first), tile.m),
         cdiv(B - first, tile.m))
        for first in range(0, B, length)
    ]  # fmt: skip
    tiles = sum(m_blocks * n_blocks for *_, m_blocks, n_blocks in blocks)
    chunks: list[_Chunk] = []
    first_tile = 0
    for first, count, m_blocks, n_blocks in blocks:
        sweep = Launch(
            _gram_mse_fwd_kernel_streamed, (G * m_blocks * n_blocks,), G=G, B=B, D_s=D_s, D_t=D_t,
            first_row=first, m_blocks=m_blocks, n_blocks=n_blocks, first_tile=first_tile,
            tiles=tiles, **call.strides, **call.epilogue,
            PRECISION=call.config.precision.features, **tile.launch_square(),
        )  # fmt: skip
        gather = None
        if call.rows_normalised:
            gather = Launch(
                _gram_mse_gather_kernel, (G * cdiv(B - first, GATHERED),), B=B, first_row=first,
                count=count, m_blocks=m_blocks, n_blocks=n_blocks, L1=call.normalize == "row_l1",
                BLOCK=tile.m, ROWS=GATHERED, PARTS=PARTS, num_warps=4,
            )  # fmt: skip
        chunks.append(_Chunk(first, m_blocks, n_blocks, sweep, gather))
        first_tile += m_blocks * n_blocks
    # as the sweep forms the terms
    sums = torch.float64 if call.dtype == torch.float32 else torch.float32
    return _Forward(chunks, 5 if call.normalize == "row_l1" else 3, tiles, sums)


def forward(
    call: Call,
    student: Tensor,  # [G, B, D_s]
    teacher: Tensor,  # [G, B, D_t]
    curve: Curve,
) -> tuple[Tensor, ...]:
    G, B = call.sizes[:2]
    plan, scales = _forward(call), call.scales(student, teacher)
    coef = new(student, G, 5, B, dtype=torch.float64)
    inputs = {"s_ptr": student, "t_ptr": teacher, "scale_ptr": scales, "coef_ptr": coef}
    if call.rows_normalised:
        losses, block = new(student, G, B), call.config.pair.m
        several = len(plan.chunks) > 1
        sums = new(student, G, plan.statistics, B, dtype=torch.float64) if several else coef
        for chunk in plan.chunks:
            m, n = chunk.m_blocks, chunk.n_blocks
            row_sums = new(student, G, n, plan.statistics, m * block, dtype=plan.sums)
            column_sums = new(student, G, m, plan.statistics, n * block, dtype=plan.sums)
            left = {"row_sums_ptr": row_sums, "column_sums_ptr": column_sums}
            chunk.sweep(**inputs, **left, **curve.exponent)
            chunk.gather(**left, sums_ptr=sums, coef_ptr=coef, loss_ptr=losses)
        loss = losses.sum(1)
    else:
        sums = new(student, G, plan.tiles)
        for chunk in plan.chunks:
            chunk.sweep(**inputs, row_sums_ptr=sums, column_sums_ptr=sums, **curve.exponent)
        loss = sums.sum(1, dtype=torch.float64)
        if curve.loss_factor != 1.0:
            loss = loss.mul_(curve.loss_factor)
        loss = loss.float()
    return loss, coef, *(new(student, G, 0, 0) for _ in range(3))


@dataclass(frozen=True)
class _Weights:
    """Rows of both Grams of which one launch makes weights."""

    first: int
    shape: tuple[int, int, int]  # G, rows, columns
    launch: Launch


@lru_cache(REMEMBERED)
def _weights(call: Call, need: tuple[bool, bool], stride_dout: int) -> list[_Weights]:
    G, B, D_s, D_t = call.sizes
    tile, chunk = call.config.pair_weights, call.config.chunk
    found = []
    for first in range(0, B, chunk):
        C, N = min(chunk, B - first), B - first
        launch = Launch(
            _gram_mse_bwd_kernel_streamed, (G * tile.count(C, N),), G=G, B=B, D_s=D_s, D_t=D_t,
            C=C, first_row=first, stride_dout=stride_dout, **call.strides, NEED_S=need[0],
            NEED_T=need[1], **call.epilogue, PRECISION=call.config.precision.features,
            **tile.launch(),
        )  # fmt: skip
        found.append(_Weights(first, (G, C, N), launch))
    return found


def gradients(
    call: Call,
    features: tuple[Tensor, Tensor],  # [G, B, D_s], [G, B, D_t]
    dout: Tensor,  # [G]
    coef: Tensor,
    need: tuple[bool, bool],
    curve: Curve,
) -> dict[int, Tensor]:  # of the sides that are needed: 0 for the student, 1 for the teacher
    student, teacher = features
    scales = call.scales(student, teacher)
    sums = {side: new(x, *x.shape) for side, x in enumerate(features) if need[side]}
    dtype = torch.bfloat16 if call.dtype == torch.bfloat16 else torch.float32
    for chunk in _weights(call, need, dout.stride(0)):
        weights = {side: new(student, *chunk.shape, dtype=dtype) for side in sums}
        some = next(iter(weights.values()))
        chunk.launch(
            dout_ptr=dout, s_ptr=student, t_ptr=teacher, scale_ptr=scales, coef_ptr=coef,
            w_s_ptr=weights.get(0, some), w_t_ptr=weights.get(1, some),
            slope_factor=curve.slope_factor, **curve.exponent,
        )  # fmt: skip
        for side, out in sums.items():
            _add_weighted(call, weights[side], features[side], out, chunk.first)
    return {
        side: normalise_gradient(features[side], dx) if call.scaled else dx.to(call.dtype)
        for side, dx in sums.items()
    }


def _add_weighted(
    call: Call,
    w: Tensor,  # [G, C, N], weights of rows from `first` on
    x: Tensor,  # [G, B, D]
    out: Tensor,  # [G, B, D]
    first: int,
) -> None:
    """Adds w x to the rows of a chunk, and w^T x to the rows after it; the first chunk finds
    nothing there."""
    product = call.config.weighted, call.config.precision.weights
    _, C, N = w.shape
    splits, add = call.config.weighted_splits, first > 0
    own = out[:, first : first + C]
    if splits == 1:
        multiply_groups(*product, w, x[:, first:], own[None], add=add)
    else:
        parts = new(x, splits, len(x), C, x.shape[2])
        multiply_groups(*product, w, x[:, first:], parts, add=False)
        own.add_(parts.sum(0)) if add else torch.sum(parts, 0, out=own)
    if N > C:
        rest = out[None, :, first + C :]
        multiply_groups(*product, w[:, :, C:].mT, x[:, first : first + C], rest, add=add)
