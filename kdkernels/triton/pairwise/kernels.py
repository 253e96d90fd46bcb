# SPDX-License-Identifier: Apache-2.0
"""Kernels of pairwise: tiles of values, and the gradient of rows from tiles of weights.

Features are contiguous. Everything accumulates in fp32. The metric is a constant of compilation, so
a kernel holds the arithmetic of one only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.distances import (
    COSINE,
    EUCLIDEAN,
    SQEUCLIDEAN,
    close_share,
    distance_tile,
    unmoved,
)
from kdkernels.triton.common.dots import dot_split
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.product import product_tile, upper_tile

DOT = tl.constexpr(3)
RBF = tl.constexpr(4)


@kernel
def _pairwise_fwd_kernel(
    x_ptr,  # [G, N, D], of distances as `centre.centred` has them
    y_ptr,  # [G, M, D]
    given_x_ptr,  # likewise, not moved
    given_y_ptr,
    x_norm_ptr,  # [G, N] fp32: squared norms (distances), 1 / norms (COSINE)
    y_norm_ptr,  # [G, M] fp32
    out_ptr,  # [G, N, M]
    N,
    M,
    D,
    gamma,
    IN_BATCH: tl.constexpr,  # y is x: only tiles on and above the diagonal have a program
    METRIC: tl.constexpr,
    PRODUCT: tl.constexpr,  # METRIC is DOT or COSINE
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # BLOCK_M if IN_BATCH
    BLOCK_K: tl.constexpr,
):
    n_blocks = tl.cdiv(N, BLOCK_M)
    if IN_BATCH:
        tiles = n_blocks * (n_blocks + 1) // 2
        i, j = upper_tile(tl.program_id(0) % tiles)
    else:
        tiles = n_blocks * tl.cdiv(M, BLOCK_N)
        i = (tl.program_id(0) % tiles) % n_blocks
        j = (tl.program_id(0) % tiles) // n_blocks
    # int64: a row number times a row's length passes 2**31 on large inputs
    g = (tl.program_id(0) // tiles).to(tl.int64)
    x_ptr += g * N * D
    y_ptr += g * M * D
    given_x_ptr = unmoved(x_ptr, given_x_ptr + g * N * D)
    given_y_ptr = unmoved(y_ptr, given_y_ptr + g * M * D)
    x_norm_ptr += g * N
    y_norm_ptr += g * M
    out_ptr += g * N * M
    offs_m = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (j * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    at_m = tl.minimum(offs_m, N - 1)
    at_n = tl.minimum(offs_n, M - 1)
    if PRODUCT:
        value = product_tile(
            x_ptr + at_m * D, y_ptr + at_n * D, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        if METRIC == COSINE:
            value *= tl.load(x_norm_ptr + at_m)[:, None]
            value *= tl.load(y_norm_ptr + at_n)[None, :]
    else:
        value, _ = distance_tile(
            x_ptr, y_ptr, given_x_ptr, given_y_ptr, x_norm_ptr, y_norm_ptr, at_m, at_n, D,
            IN_BATCH, EUCLIDEAN if METRIC == EUCLIDEAN else SQEUCLIDEAN, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K, METRIC == RBF, gamma,
        )  # fmt: skip
        if IN_BATCH:  # itself; NaN stays
            itself = (offs_m[:, None] == offs_n[None, :]) & (value >= 0.0)
            value = tl.where(itself, 0.0, value)
        if METRIC == RBF:
            value = tl.exp(-gamma * value)
    inside = (offs_m < N)[:, None] & (offs_n < M)[None, :]
    if IN_BATCH:
        if i == j:  # the order of sums in a product may differ between (m, n) and (n, m)
            value = tl.where(offs_m[:, None] <= offs_n[None, :], value, tl.trans(value))
        mirrored = tl.trans(value).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_n[:, None] * M + offs_m[None, :], mirrored, mask=tl.trans(inside))
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * M + offs_n[None, :], value, mask=inside)


@triton.jit
def _weights(
    dout_ptr,  # [N, M]
    out_ptr,  # [N, M], distances only
    x_norm,  # [m, 1]
    y_norm_ptr,  # [M] fp32
    offs_m,  # [m, 1]
    offs_k,  # [1, k]
    N,
    last,
    gamma,
    share,  # see close_share
    stride_dn,
    stride_dm,
    stride_on,
    stride_om,
    IN_BATCH: tl.constexpr,
    METRIC: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """([m, k] weights w: dx is the sum of w y, or of distances that of w (x - y); whether x and y
    are so close that products would lose x - y)."""
    mask = (offs_m < N) & (offs_k < last)
    w = tl.load(dout_ptr + offs_m * stride_dn + offs_k * stride_dm, mask=mask, other=0.0)
    w = w.to(tl.float32)
    if IN_BATCH:
        back = tl.load(dout_ptr + offs_k * stride_dn + offs_m * stride_dm, mask=mask, other=0.0)
        w += back.to(tl.float32)
    near = w != w
    if METRIC != DOT:
        y_norm = tl.load(y_norm_ptr + offs_k, mask=offs_k < last, other=0.0)
    if METRIC == COSINE:
        w *= y_norm
    if not PRODUCT:
        if IN_BATCH:
            w = tl.where(offs_m == offs_k, 0.0, w)
        value = tl.load(out_ptr + offs_m * stride_on + offs_k * stride_om, mask=mask, other=0.0)
        value = value.to(tl.float32)
        size = (x_norm + y_norm) * share
        if METRIC == EUCLIDEAN:
            slope = tl.where(value == 0.0, 0.0, 1.0 / tl.where(value == 0.0, 1.0, value))
            near = value * value <= size
        elif METRIC == SQEUCLIDEAN:
            slope = tl.full(value.shape, 2.0, tl.float32)
            near = value <= size
        else:
            slope = -2.0 * gamma * value
            near = value >= tl.exp(-gamma * size)
        w = tl.where(w == 0.0, 0.0, w * slope)
        near = near & (w != 0.0)
    return w, near


@kernel
def _pairwise_bwd_kernel(
    dout_ptr,  # [G, N, M]
    out_ptr,  # [G, N, M], distances only
    x_ptr,  # [G, N, D]: all of them as in the forward
    y_ptr,  # [G, M, D]
    given_x_ptr,
    given_y_ptr,
    x_norm_ptr,  # [G, N] fp32
    y_norm_ptr,  # [G, M] fp32
    dx_ptr,  # [splits, G, N, D] fp32
    G,
    N,
    M,
    D,
    gamma,
    split_length,  # a multiple of BLOCK_K
    stride_dg,
    stride_dn,
    stride_dm,
    stride_on,  # of out, whose groups lie N * M apart
    stride_om,
    IN_BATCH: tl.constexpr,
    METRIC: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of x, or with sides exchanged that of y; if IN_BATCH, through both sides.

    COSINE: of the unit rows, divided by the norms.
    """
    m_blocks = tl.cdiv(N, BLOCK_M)
    tiles = m_blocks * tl.cdiv(D, BLOCK_N)
    g = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(1)
    dout_ptr += g * stride_dg
    out_ptr += g * N * M
    x_ptr += g * N * D
    y_ptr += g * M * D
    given_x_ptr = unmoved(x_ptr, given_x_ptr + g * N * D)
    given_y_ptr = unmoved(y_ptr, given_y_ptr + g * M * D)
    x_norm_ptr += g * N
    y_norm_ptr += g * M
    offs_m = ((tile % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    offs_d = ((tile // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (offs_m < N) & (offs_d < D)
    x_norm = tl.zeros((BLOCK_M, 1), tl.float32)
    if METRIC != DOT:
        x_norm = tl.load(x_norm_ptr + offs_m, mask=offs_m < N, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    any_near = 0
    share = close_share(x_ptr, D)
    first = split * split_length
    last = tl.minimum(first + split_length, M)
    for k in range(first, last, BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        w, near = _weights(
            dout_ptr, out_ptr, x_norm, y_norm_ptr, offs_m, offs_k[None, :], N, last, gamma,
            share, stride_dn, stride_dm, stride_on, stride_om, IN_BATCH, METRIC, PRODUCT,
        )  # fmt: skip
        if not PRODUCT:
            any_near = tl.maximum(any_near, tl.max(near.to(tl.int32)))
            w = tl.where(near, 0.0, w)
            total += tl.sum(w, 1)
        y_mask = (offs_k < last)[:, None] & (offs_d < D)
        y = tl.load(y_ptr + offs_k[:, None] * D + offs_d, mask=y_mask, other=0.0)
        acc = dot_split(w, y, acc, PRECISION)
    if METRIC == COSINE:
        acc *= x_norm
    if not PRODUCT:
        x = tl.load(x_ptr + offs_m * D + offs_d, mask=mask, other=0.0).to(tl.float32)
        acc = total[:, None] * x - acc
        if any_near > 0:  # column by column, from differences
            x = tl.load(given_x_ptr + offs_m * D + offs_d, mask=mask, other=0.0).to(tl.float32)
            for k in range(first, last, BLOCK_K):
                offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
                _, near = _weights(
                    dout_ptr, out_ptr, x_norm, y_norm_ptr, offs_m, offs_k[None, :], N, last, gamma,
                    share, stride_dn, stride_dm, stride_on, stride_om, IN_BATCH, METRIC,
                    PRODUCT,
                )  # fmt: skip
                if tl.max(near.to(tl.int32)) > 0:
                    for at in range(k, tl.minimum(k + BLOCK_K, last)):
                        column = (at + tl.arange(0, 1)).to(tl.int64)[None, :]
                        weight, close = _weights(
                            dout_ptr, out_ptr, x_norm, y_norm_ptr, offs_m, column, N, last, gamma,
                            share, stride_dn, stride_dm, stride_on, stride_om, IN_BATCH,
                            METRIC, PRODUCT,
                        )  # fmt: skip
                        y_at = tl.load(
                            given_y_ptr + column * D + offs_d, mask=offs_d < D, other=0.0
                        )
                        acc += tl.where(close, weight, 0.0) * (x - y_at.to(tl.float32))
    tl.store(dx_ptr + (split * G + g) * N * D + offs_m * D + offs_d, acc, mask=mask)
