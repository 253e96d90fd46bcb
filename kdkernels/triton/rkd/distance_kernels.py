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


@kernel
def _rkd_sum_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # the same
    given_x_ptr,  # [B, D]
    given_r_ptr,  # the same
    x_norm_ptr,  # [B] fp32, squared
    r_norm_ptr,  # the same
    sum_ptr,  # [tiles] fp64
    B,
    M,  # B
    D,
    IN_BATCH: tl.constexpr,
    DISTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of distances above the diagonal."""
    m_blocks = tl.cdiv(B, BLOCK_M)
    row = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = 0.0
    if tl.min(row) < tl.max(column):
        d, _ = distance_tile(
            x_ptr, r_ptr, given_x_ptr, given_r_ptr, x_norm_ptr, r_norm_ptr, tl.minimum(row, B - 1),
            tl.minimum(column, B - 1), D, IN_BATCH, DISTANCE, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        column = tl.where(column < M, column, -1)
        total = tl.sum(tl.where(row[:, None] < column[None, :], d, 0.0))
    tl.store(sum_ptr + tl.program_id(0), total.to(tl.float64))


@kernel
def _rkd_pairs_kernel(
    s_ptr,  # [B, D_s]
    t_ptr,  # [B, D_t]
    given_s_ptr,  # [B, D_s]
    given_t_ptr,  # [B, D_t]
    s_norm_ptr,  # [B] fp32, squared
    t_norm_ptr,  # [B] fp32, squared
    inverse_s_ptr,  # [] fp32: 1 / mean distance, or 0
    inverse_t_ptr,  # [] fp32
    shared_ptr,  # [] fp32: mean of g h over different rows
    loss_ptr,  # [tiles] fp64: sum above the diagonal
    product_ptr,  # [tiles] fp64: likewise of g h
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
    sums of huber(e) and of g h; or (g - shared) / distance."""
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
        h = d * tl.load(inverse_s_ptr)
        e = h - d_t * tl.load(inverse_t_ptr)
        g = huber_slope(e)
        if WEIGHTS:
            w = gradient_weight(g - tl.load(shared_ptr), d, EUCLIDEAN)
            inside = (local < rows)[:, None] & (column < B)[None, :]
            tl.store(w_ptr + local.to(tl.int64)[:, None] * B + column[None, :], w, mask=inside)
            store_close(close_ptr, close, m_blocks, tl.cdiv(B, BLOCK_N))
        else:
            column = tl.where(column < B, column, -1)
            above = (first + local)[:, None] < column[None, :]
            loss = tl.sum(tl.where(above, g * (e - 0.5 * g), 0.0))
            product = tl.sum(tl.where(above, g * h, 0.0))
    if not WEIGHTS:
        tl.store(loss_ptr + tl.program_id(0), loss.to(tl.float64))
        tl.store(product_ptr + tl.program_id(0), product.to(tl.float64))
