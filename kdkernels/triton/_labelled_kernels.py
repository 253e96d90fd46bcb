# SPDX-License-Identifier: Apache-2.0
"""Distances between labelled rows, tile by tile, and how weights on them pull the rows.

Features are contiguous, in the order of their labels. Everything accumulates in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton._common import dot, dot_split
from kdkernels.triton._triplet_kernels import EUCLIDEAN, FINITE, SQEUCLIDEAN

# |x|^2 + |r|^2 - 2 <x, r> has lost four bits where it is below this share of |x|^2 + |r|^2.
CLOSE = tl.constexpr(1 / 16)


@triton.jit
def product_tile(
    x_ptrs,  # [m] rows of x
    r_ptrs,  # [n] rows of r
    D,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[m, n] products of contiguous rows."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs[:, None] + ks[None, :], mask=(ks < D)[None, :], other=0.0)
        r = tl.load(r_ptrs[None, :] + ks[:, None], mask=(ks < D)[:, None], other=0.0)
        acc = dot(x, r, acc, PRECISION)
    return acc


@triton.jit
def distance_tile(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]
    x_norm_ptr,  # [B] fp32, squared
    r_norm_ptr,  # [M] fp32, squared
    offs_m,  # [m] rows of x
    offs_n,  # [n] rows of r
    D,
    OWN: tl.constexpr,
    DISTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """([m, n] distances; whether two of these rows are close).

    NaN where a row is not finite; with OWN meaningless between a row and itself. From products,
    but where rows are close from differences: then the products cancel. Sorted by label, such rows
    share few tiles. Coincident rows are at distance 0.
    """
    # int64: a row number times D passes 2**31 on large inputs
    x_ptrs = x_ptr + offs_m.to(tl.int64) * D
    r_ptrs = r_ptr + offs_n.to(tl.int64) * D
    acc = product_tile(x_ptrs, r_ptrs, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    x_norm = tl.load(x_norm_ptr + offs_m)
    r_norm = tl.load(r_norm_ptr + offs_n)
    # in this order, so that nothing is rounded to the digits of the sum of the norms
    d2 = (x_norm[:, None] - acc) + (r_norm[None, :] - acc)
    near = d2 < (x_norm[:, None] + r_norm[None, :]) * CLOSE
    if OWN:
        near = near & (offs_m[:, None] != offs_n[None, :])
    close = tl.max(near.to(tl.int32))
    if close > 0:
        d2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for column in range(0, D):
            x_column = tl.load(x_ptrs + column).to(tl.float32)
            r_column = tl.load(r_ptrs + column).to(tl.float32)
            difference = x_column[:, None] - r_column[None, :]
            d2 += difference * difference
    finite = (x_norm < FINITE)[:, None] & (r_norm < FINITE)[None, :]
    d2 = tl.where(finite, tl.where(d2 > 0.0, d2, 0.0), float("nan"))
    if DISTANCE == EUCLIDEAN:
        d2 = tl.sqrt_rn(d2)
    elif DISTANCE != SQEUCLIDEAN:
        d2 = 0.5 * d2
    return d2, close


@triton.jit
def pull_weight(weight, d, DISTANCE: tl.constexpr):
    """w of d(sum)/dx = w (x - r), given the derivative of the sum by the distance d of x and r; 0
    between coincident points."""
    if DISTANCE == EUCLIDEAN:
        return tl.where(d == 0.0, 0.0, weight / tl.where(d == 0.0, 1.0, d))
    elif DISTANCE == SQEUCLIDEAN:
        return 2.0 * weight
    else:
        return weight


@triton.jit
def store_close(close_ptr, close, m_blocks, n_blocks):
    """Tiles are numbered down the columns."""
    tile = (tl.program_id(0) % m_blocks) * n_blocks + tl.program_id(0) // m_blocks
    tl.store(close_ptr + tile, close)


@triton.jit
def _labelled_distances_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]
    x_norm_ptr,  # [B] fp32, squared
    r_norm_ptr,  # [M] fp32, squared
    d_ptr,  # [rows, M] fp32: distances of the anchors from row `first` on
    close_ptr,  # [tiles of rows, tiles of M] int32: whether two rows there are close
    first,
    rows,
    B,
    M,
    D,
    OWN: tl.constexpr,
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
        x_ptr, r_ptr, x_norm_ptr, r_norm_ptr, tl.minimum(first + local, B - 1),
        tl.minimum(offs_n, M - 1), D, OWN, DISTANCE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offs = local.to(tl.int64)[:, None] * M + offs_n[None, :]
    tl.store(d_ptr + offs, d, mask=(local < rows)[:, None] & (offs_n < M)[None, :])
    store_close(close_ptr, close, m_blocks, tl.cdiv(M, BLOCK_N))


@triton.jit
def _labelled_pull_kernel(
    w_ptr,  # [N, K] fp32 weights; [K, N] if TRANSPOSED
    x_ptr,  # [N, D]
    r_ptr,  # [K, D]
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
    for tile in range(first, last, CLOSE_K):
        if tl.load(close_ptr + tile // CLOSE_K * stride_ck) != 0:
            for k in range(tile, tl.minimum(tile + CLOSE_K, K)):
                wide = tl.cast(k, tl.int64)
                w = tl.load(w_ptrs + wide * stride_wk, mask=mask_m, other=0.0)
                r = tl.load(r_ptr + wide * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
                acc += w[:, None] * (x - r[None, :])
    tl.store(out_ptr + split.to(tl.int64) * N * D + offs, acc, mask=mask)
