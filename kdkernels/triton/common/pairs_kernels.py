# SPDX-License-Identifier: Apache-2.0
"""Distances between labelled rows, tile by tile, and the gradient that weights on them
give the rows.

Features are contiguous, in the order of their labels. Everything accumulates in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.distances import distance_tile
from kdkernels.triton.common.dots import dot_split
from kdkernels.triton.common.jit import kernel


@triton.jit
def store_close(close_ptr, close, m_blocks, n_blocks):
    """Tiles are numbered down the columns."""
    tile = (tl.program_id(0) % m_blocks) * n_blocks + tl.program_id(0) // m_blocks
    tl.store(close_ptr + tile, close)


@kernel
def _pairs_distances_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]
    given_x_ptr,  # [B, D]
    given_r_ptr,  # [M, D]
    x_norm_ptr,  # [B] fp32, squared
    r_norm_ptr,  # [M] fp32, squared
    d_ptr,  # [rows, M] fp32: distances of the anchors from row `first` on
    close_ptr,  # [tiles of rows, tiles of M] int32: whether two rows there are close
    first,
    rows,
    B,
    M,
    D,
    IN_BATCH: tl.constexpr,
    DISTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m_blocks = tl.cdiv(rows, BLOCK_M)
    local = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, close = distance_tile(
        x_ptr, r_ptr, given_x_ptr, given_r_ptr, x_norm_ptr, r_norm_ptr,
        tl.minimum(first + local, B - 1), tl.minimum(offs_n, M - 1), D, IN_BATCH, DISTANCE,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offs = local.to(tl.int64)[:, None] * M + offs_n[None, :]
    tl.store(d_ptr + offs, d, mask=(local < rows)[:, None] & (offs_n < M)[None, :])
    store_close(close_ptr, close, m_blocks, tl.cdiv(M, BLOCK_N))


@kernel
def _pairs_gradient_kernel(
    w_ptr,  # [N, K] fp32 weights; [K, N] if TRANSPOSED
    x_ptr,  # [N, D]
    r_ptr,  # [K, D]
    given_x_ptr,  # x and r, or what they are less a common row that rounding made inexact
    given_r_ptr,
    close_ptr,  # [N / CLOSE_N, K / CLOSE_K] int32, or so: whether two rows there are close
    out_ptr,  # [splits, N, D] fp32
    N,
    K,
    D,
    split_length,  # a multiple of CLOSE_K
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # divides CLOSE_N
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides CLOSE_K
    CLOSE_N: tl.constexpr,
    CLOSE_K: tl.constexpr,
):
    """Row i: the sum of w_ik (x_i - r_k) over the k of a split.

    As a difference of products, but where rows are close from differences: there the weights may be
    so large that the products cancel.
    """
    m_blocks = tl.cdiv(N, BLOCK_M)
    split = tl.program_id(1)
    offs_m = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = (tl.program_id(0) // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < N
    mask_d = offs_d < D
    if TRANSPOSED:
        stride_wn, stride_cn = 1, 1
        stride_wk, stride_ck = N, tl.cdiv(N, CLOSE_N)
    else:
        stride_wn, stride_cn = K, tl.cdiv(K, CLOSE_K)
        stride_wk, stride_ck = 1, 1
    w_ptrs = w_ptr + offs_m.to(tl.int64) * stride_wn
    close_ptr += (tl.program_id(0) % m_blocks) * BLOCK_M // CLOSE_N * stride_cn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = split * split_length
    last = tl.minimum(first + split_length, K)
    for k in range(first, last, BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = (offs_k < K) & (tl.load(close_ptr + k // CLOSE_K * stride_ck) == 0)
        w = tl.load(
            w_ptrs[:, None] + offs_k[None, :] * stride_wk,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        r = tl.load(
            r_ptr + offs_k[:, None] * D + offs_d[None, :],
            mask=mask_k[:, None] & mask_d[None, :],
            other=0.0,
        )
        acc = dot_split(w, r, acc, PRECISION)
        total += tl.sum(w, 1)
    offs = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    mask = mask_m[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    acc = total[:, None] * x - acc
    x = tl.load(given_x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for tile in range(first, last, CLOSE_K):
        if tl.load(close_ptr + tile // CLOSE_K * stride_ck) != 0:
            for k in range(tile, tl.minimum(tile + CLOSE_K, K)):
                wide = tl.cast(k, tl.int64)
                w = tl.load(w_ptrs + wide * stride_wk, mask=mask_m, other=0.0)
                r = tl.load(given_r_ptr + wide * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
                acc += w[:, None] * (x - r[None, :])
    tl.store(out_ptr + split.to(tl.int64) * N * D + offs, acc, mask=mask)
