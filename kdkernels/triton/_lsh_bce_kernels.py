# SPDX-License-Identifier: Apache-2.0
"""Kernels of lsh_bce.

Projections leave their tile as bits, as losses, or as derivatives of a chunk that a second product
reads while it is in the L2 cache. Partial sums are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton._common import dot


@triton.jit
def _project(
    x_ptr,  # [B, D]
    w_ptr,  # [N, D]
    b_ptr,  # [N], or unused
    offs_m,
    offs_n,
    keep,  # [BLOCK_M], which rows are read; the others project to the bias
    N,
    D,
    stride_xm,
    stride_xd,
    stride_wn,
    stride_wd,
    stride_b,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x w^T + b of a tile, fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    # int64: a row number times a row stride passes 2**31 on large inputs
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + offs_k
        mask_k = ks < D
        x = tl.load(
            x_ptrs + ks.to(tl.int64)[None, :] * stride_xd,
            mask=keep[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptrs + ks.to(tl.int64)[:, None] * stride_wd,
            mask=mask_n[None, :] & mask_k[:, None],
            other=0.0,
        )
        acc = dot(x, w, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_n * stride_b, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1] as 2 atanh(e / (2 + e)): the Taylor polynomial of
    csrc/lsh_bce/lsh_bce_math.h."""
    s = e / (2.0 + e)
    s2 = s * s
    p = s2 * (1.0 / 13.0) + (1.0 / 11.0)
    p = s2 * p + (1.0 / 9.0)
    p = s2 * p + (1.0 / 7.0)
    p = s2 * p + (1.0 / 5.0)
    p = s2 * p + (1.0 / 3.0)
    return 2.0 * s * (s2 * p + 1.0)


@triton.jit
def _lsh_bce_encode_kernel(
    x_ptr,  # [B, D]
    w_ptr,  # [N, D]
    b_ptr,  # [N], or unused
    codes_ptr,  # [B, ceil(N / 8)] uint8
    B,
    N,
    D,
    stride_xm,
    stride_xd,
    stride_wn,
    stride_wd,
    stride_b,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(B, BLOCK_M)
    i, j = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    offs_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < B
    z = _project(
        x_ptr, w_ptr, b_ptr, offs_m, offs_n, mask_m, N, D, stride_xm, stride_xd, stride_wn,
        stride_wd, stride_b, HAS_BIAS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    positive = (z > 0.0) & (offs_n < N)[None, :]
    bits = positive.to(tl.int32) << (offs_n % 8)[None, :]
    codes = tl.sum(tl.reshape(bits, (BLOCK_M, BLOCK_N // 8, 8)), 2)
    width = tl.cdiv(N, 8)
    offs_byte = j * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    tl.store(
        codes_ptr + offs_m.to(tl.int64)[:, None] * width + offs_byte[None, :],
        codes.to(tl.uint8),
        mask=mask_m[:, None] & (offs_byte < width)[None, :],
    )


@triton.jit
def _lsh_bce_project_kernel(
    s_ptr,  # [B, D]
    codes_ptr,  # [B, ceil(N / 8)] uint8
    w_ptr,  # [N, D]
    b_ptr,  # [N], or unused
    keep_ptr,  # [B] int32, or unused
    factor_ptr,  # [B] fp32, or unused
    loss_ptr,  # [tiles of N, B] fp32, or unused: sums over the directions of a tile
    dz_ptr,  # [B, N], or unused: factor times the derivatives
    db_ptr,  # [tiles of B, N] fp32, or unused: sums of dz over the rows of a tile
    B,
    N,
    D,
    stride_sm,
    stride_sd,
    stride_cm,
    stride_cn,
    stride_wn,
    stride_wd,
    stride_b,
    stride_keep,
    stride_factor,
    stride_loss,  # of its first axis
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    LOSS: tl.constexpr,  # which results are asked for
    DZ: tl.constexpr,
    DB: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(B, BLOCK_M)
    i, j = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    offs_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < B
    keep = mask_m
    if HAS_MASK:
        keep &= tl.load(keep_ptr + offs_m * stride_keep, mask=mask_m, other=0) != 0
    z = _project(
        s_ptr, w_ptr, b_ptr, offs_m, offs_n, keep, N, D, stride_sm, stride_sd, stride_wn,
        stride_wd, stride_b, HAS_BIAS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    counts = keep[:, None] & (offs_n < N)[None, :]
    code = tl.load(
        codes_ptr
        + offs_m.to(tl.int64)[:, None] * stride_cm
        + (offs_n // 8).to(tl.int64)[None, :] * stride_cn,
        mask=counts,
        other=0,
    )
    y = ((code.to(tl.int32) >> (offs_n % 8)[None, :]) & 1).to(tl.float32)
    e = tl.exp(-tl.abs(z))
    if LOSS:
        # a comparison that is false for NaN keeps it, through z y
        loss = tl.where(z > 0.0, z, 0.0) - z * y + _log1p_unit(e)
        sums = tl.sum(tl.where(counts, loss, 0.0), 1)
        tl.store(loss_ptr + j.to(tl.int64) * stride_loss + offs_m, sums, mask=mask_m)
    if DZ or DB:
        # sigmoid(z) - y without its cancellation: the sigmoid of z, or minus that of -z
        sign = 1.0 - 2.0 * y
        dz = sign * (tl.where(sign * z >= 0.0, 1.0, e) / (1.0 + e))
        if HAS_FACTOR:
            factor = tl.load(factor_ptr + offs_m * stride_factor, mask=mask_m, other=0.0)
            dz *= factor[:, None]
        dz = tl.where(counts, dz, 0.0)
        if DZ:
            tl.store(
                dz_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :],
                dz.to(dz_ptr.dtype.element_ty),
                mask=mask_m[:, None] & (offs_n < N)[None, :],
            )
        if DB:
            tl.store(db_ptr + i.to(tl.int64) * N + offs_n, tl.sum(dz, 0), mask=offs_n < N)


@triton.jit
def _lsh_bce_product_kernel(
    a_ptr,  # [M, K]
    x_ptr,  # [K, N]
    keep_ptr,  # [K] int32, or unused: which rows of x are read
    out_ptr,  # [splits, M, N]
    M,
    N,
    K,
    split_k,  # length of a split; a multiple of BLOCK_K
    stride_am,
    stride_ak,
    stride_xk,
    stride_xn,
    stride_keep,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    offs_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    k_first = split * split_k
    a_ptrs = a_ptr + offs_m.to(tl.int64)[:, None] * stride_am
    x_ptrs = x_ptr + offs_n.to(tl.int64)[None, :] * stride_xn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k_first, tl.minimum(k_first + split_k, K), BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask_k = ks < K
        a = tl.load(
            a_ptrs + ks.to(tl.int64)[None, :] * stride_ak,
            mask=(offs_m < M)[:, None] & mask_k[None, :],
            other=0.0,
        )
        read = mask_k
        if HAS_MASK:
            read &= tl.load(keep_ptr + ks * stride_keep, mask=mask_k, other=0) != 0
        x = tl.load(
            x_ptrs + ks.to(tl.int64)[:, None] * stride_xk,
            mask=(offs_n < N)[None, :] & read[:, None],
            other=0.0,
        )
        acc = dot(a, x.to(a.dtype), acc, PRECISION)
    tl.store(
        out_ptr + (split.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
    )


@triton.jit
def _lsh_bce_bwd_kernel_scale(
    dout_ptr,  # [B]
    dloss_ptr,  # [B, D]
    ds_ptr,  # [B, D]
    D,
    count,  # B D
    stride_dout,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    dout = tl.load(dout_ptr + offs // D * stride_dout, mask=mask, other=0.0)
    ds = dout * tl.load(dloss_ptr + offs, mask=mask, other=0.0)
    tl.store(ds_ptr + offs, ds.to(ds_ptr.dtype.element_ty), mask=mask)
