# SPDX-License-Identifier: Apache-2.0
"""Distances of both sides of rkd_distance, tile by tile, with their sum or their loss."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.distances import EUCLIDEAN, distance_tile, gradient_weight
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.pairs_kernels import store_close


@triton.jit
def huber_slope(e):
    """The derivative of huber(e); NaN stays."""
    e = tl.where(e > 1.0, 1.0, e)
    return tl.where(e < -1.0, -1.0, e)


@triton.jit
def _store_sum(
    x_ptr, given_ptr, norm_ptr, sum_ptr, B, D, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m_blocks = tl.cdiv(B, BLOCK_M)
    row = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = 0.0
    if tl.min(row) < tl.max(column):
        d, _ = distance_tile(
            x_ptr, x_ptr, given_ptr, given_ptr, norm_ptr, norm_ptr, tl.minimum(row, B - 1),
            tl.minimum(column, B - 1), D, True, EUCLIDEAN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        column = tl.where(column < B, column, -1)
        total = tl.sum(tl.where(row[:, None] < column[None, :], d, 0.0))
    tl.store(sum_ptr + tl.program_id(0), total.to(tl.float64))


@kernel
def _rkd_sum_kernel(
    s_ptr,  # [B, D_s]
    t_ptr,  # [B, D_t]
    given_s_ptr,  # [B, D_s]
    given_t_ptr,  # [B, D_t]
    s_norm_ptr,  # [B] fp32, squared
    t_norm_ptr,  # [B] fp32, squared
    sum_ptr,  # [2, tiles] fp64
    B,
    D_s,
    D_t,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of distances above the diagonal, of both sides."""
    if tl.program_id(1) == 0:
        _store_sum(
            s_ptr, given_s_ptr, s_norm_ptr, sum_ptr, B, D_s, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        _store_sum(
            t_ptr, given_t_ptr, t_norm_ptr, sum_ptr + tl.num_programs(0), B, D_t, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def sum_all(x_ptr, count, BLOCK: tl.constexpr):
    """In fp64, by one program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, count, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offs, mask=offs < count, other=0).to(tl.float64)
    return tl.sum(total, 0)


@kernel
def _rkd_means_kernel(
    sum_ptr,  # [2, tiles] fp64
    inverse_ptr,  # [2] fp32: 1 / mean distance of different rows, or 0 where it would be infinite
    B,
    tiles,
    BLOCK: tl.constexpr,
):
    count = tl.cast(B, tl.float64)
    total = sum_all(sum_ptr + tl.program_id(0) * tiles, tiles, BLOCK)
    zero = total == 0.0
    inverse = 0.5 * count * (count - 1.0) / tl.where(zero, 1.0, total)
    tl.store(inverse_ptr + tl.program_id(0), tl.where(zero, 0.0, inverse).to(tl.float32))


@kernel
def _rkd_loss_kernel(
    sum_ptr,  # [2, tiles] fp64: of the losses and of g h, above the diagonal
    inverse_ptr,  # [2] fp32
    loss_ptr,  # [] fp32
    factors_ptr,  # [2] fp32: mean of g h over different rows; what the gradient is multiplied by
    B,
    tiles,
    BLOCK: tl.constexpr,
):
    """Each pair stands for two of the B^2."""
    count = tl.cast(B, tl.float64)
    scale = 2.0 / (count * count)
    tl.store(loss_ptr, (sum_all(sum_ptr, tiles, BLOCK) * scale).to(tl.float32))
    shared = sum_all(sum_ptr + tiles, tiles, BLOCK) / (0.5 * count * (count - 1.0))
    tl.store(factors_ptr, shared.to(tl.float32))
    tl.store(factors_ptr + 1, (tl.load(inverse_ptr).to(tl.float64) * scale).to(tl.float32))


@kernel(lengths=("B",))
def _rkd_pairs_kernel(
    s_ptr,  # [B, D_s]
    t_ptr,  # [B, D_t]
    given_s_ptr,  # [B, D_s]
    given_t_ptr,  # [B, D_t]
    s_norm_ptr,  # [B] fp32, squared
    t_norm_ptr,  # [B] fp32, squared
    inverse_ptr,  # [2] fp32: 1 / mean distance of each side, or 0
    factors_ptr,  # [2] fp32, with WEIGHTS: mean of g h over different rows, and a factor
    sum_ptr,  # [2, tiles] fp64: sums above the diagonal, of the losses and of g h
    w_ptr,  # [rows, B] fp32: weights of the rows from `first` on
    close_ptr,  # [tiles of rows, tiles of B] int32: whether two rows of the student are close
    first,
    rows,
    B,
    D_s,
    D_t,
    WEIGHTS: tl.constexpr,  # else sums
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With h the distances over their means, e their difference and g the derivative of huber(e):
    sums of huber(e) and of g h; or the gradient's weights, (g - the mean of g h) / distance."""
    m_blocks = tl.cdiv(rows, BLOCK_M)
    local = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    loss = 0.0
    product = 0.0
    if WEIGHTS or tl.min(first + local) < tl.max(column):
        at_m = tl.minimum(first + local, B - 1)
        at_n = tl.minimum(column, B - 1)
        d_t, _ = distance_tile(
            t_ptr, t_ptr, given_t_ptr, given_t_ptr, t_norm_ptr, t_norm_ptr, at_m, at_n, D_t,
            True, EUCLIDEAN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        d, close = distance_tile(
            s_ptr, s_ptr, given_s_ptr, given_s_ptr, s_norm_ptr, s_norm_ptr, at_m, at_n, D_s,
            True, EUCLIDEAN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if WEIGHTS:  # here, where few other masks are alive, of which AMD devices hold few
            d = tl.where(at_m[:, None] == at_n[None, :], 0.0, d)
        h = d * tl.load(inverse_ptr)
        e = h - d_t * tl.load(inverse_ptr + 1)
        g = huber_slope(e)
        if WEIGHTS:
            w = gradient_weight(g - tl.load(factors_ptr), d, EUCLIDEAN)
            inside = (local < rows)[:, None] & (column < B)[None, :]
            tl.store(w_ptr + local.to(tl.int64)[:, None] * B + column[None, :], w, mask=inside)
            store_close(close_ptr, close, m_blocks, tl.cdiv(B, BLOCK_N))
        else:
            column = tl.where(column < B, column, -1)
            above = (first + local)[:, None] < column[None, :]
            loss = tl.sum(tl.where(above, g * (e - 0.5 * g), 0.0))
            product = tl.sum(tl.where(above, g * h, 0.0))
    if not WEIGHTS:
        tl.store(sum_ptr + tl.program_id(0), loss.to(tl.float64))
        tl.store(sum_ptr + tl.num_programs(0) + tl.program_id(0), product.to(tl.float64))
