# SPDX-License-Identifier: Apache-2.0
"""Kernels of lsh_bce.

Projections leave their tile as bits, as losses, or as derivatives of a chunk that a second product
reads while it is in the L2 cache. Partial sums are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.dots import dot
from kdkernels.triton.common.exp_math import two_atanh
from kdkernels.triton.common.jit import kernel


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


@kernel
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


@kernel
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
        loss = tl.where(z > 0.0, z, 0.0) - z * y + two_atanh(e / (2.0 + e))
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


@kernel(counts=("loss_programs", "stride_partial"))
def _lsh_bce_finish_kernel(
    partial_ptr,  # [tiles, B] fp32, stride_partial apart: losses
    loss_ptr,  # [B] fp32
    parts_ptr,  # [splits, count] fp32: of the derivative by the student
    dloss_ptr,  # [count] fp32
    B,
    tiles,
    stride_partial,
    splits,
    count,
    loss_programs,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first programs add up losses, the others derivatives."""
    pid = tl.program_id(0)
    if pid < loss_programs:
        rows = pid * ROWS + tl.arange(0, ROWS)
        loss = tl.zeros((ROWS,), tl.float32)
        for first in range(0, tiles, PARTS):
            part = first + tl.arange(0, PARTS)
            losses = tl.load(
                partial_ptr + part.to(tl.int64)[:, None] * stride_partial + rows[None, :],
                mask=(part < tiles)[:, None] & (rows < B)[None, :],
                other=0.0,
            )
            loss += tl.sum(losses, 0)
        tl.store(loss_ptr + rows, loss, mask=rows < B)
    else:
        offs = (pid - loss_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        dloss = tl.zeros((BLOCK,), tl.float32)
        for split in range(splits):
            source = parts_ptr + tl.cast(split, tl.int64) * count
            dloss += tl.load(source + offs, mask=offs < count, other=0.0)
        tl.store(dloss_ptr + offs, dloss, mask=offs < count)


@kernel
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
