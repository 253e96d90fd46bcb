# SPDX-License-Identifier: Apache-2.0
"""Kernels of the second sweep of relational_kl: derivatives by logits of a chunk of rows or keys,
and their products with what each side's logits come from."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.dots import dot
from kdkernels.triton.common.product import split_tile, store_split
from kdkernels.triton.relational_kl.kernels import logits, number_of_keys


@triton.jit
def _relational_kl_derivatives_kernel(
    x_ptr,  # [B, D] fp32, contiguous
    y_ptr,  # [B, E] fp32, contiguous, or unused
    keys_ptr,  # [K, D], from key `first` on
    teacher_keys_ptr,  # [K, E], or unused
    scale_ptr,  # [K] fp32, or unused
    teacher_scale_ptr,  # [K] fp32, or unused
    positives_ptr,  # [B] int64, or unused
    exclude_ptr,  # [B] int64, or unused
    num_keys_ptr,  # [] int64, or unused
    loss_ptr,  # [B] fp32
    lse_s_ptr,  # [B] fp32
    lse_t_ptr,  # [B] fp32
    dout_ptr,  # [B] fp32
    g_ptr,  # [B, K], or unused: dout times derivatives by the student's logits
    h_ptr,  # [B, K], or unused: by the teacher's
    first,  # of these keys among all
    total,  # number of all keys
    B,
    K,
    D,
    E,
    stride_kn,
    stride_kd,
    stride_rn,
    stride_rd,
    stride_dout,
    TEACHER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_NUM_KEYS: tl.constexpr,
    ENTROPY: tl.constexpr,
    STUDENT: tl.constexpr,  # whether g is asked for
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(B, BLOCK_M)
    offs_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < B
    stored = mask_m[:, None] & (offs_n < K)[None, :]
    counting = number_of_keys(num_keys_ptr, total, HAS_NUM_KEYS)
    counts = mask_m[:, None] & (offs_n < tl.minimum(counting - first, K))[None, :]
    if HAS_EXCLUDE:
        exclude = tl.load(exclude_ptr + offs_m, mask=mask_m, other=-1)
        counts &= (first + offs_n)[None, :] != exclude[:, None]
    offs_w = offs_m.to(tl.int64)[:, None] * K + offs_n[None, :]
    dout = tl.load(dout_ptr + offs_m * stride_dout, mask=mask_m, other=0.0)
    lse_s = tl.load(lse_s_ptr + offs_m, mask=mask_m, other=0.0)
    a = logits(
        x_ptr, keys_ptr, scale_ptr, offs_m, offs_n, B, K, D, stride_kn, stride_kd, HAS_SCALE,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    log_q = a - lse_s[:, None]
    if TEACHER:
        b = logits(
            y_ptr, teacher_keys_ptr, teacher_scale_ptr, offs_m, offs_n, B, K, E, stride_rn,
            stride_rd, HAS_SCALE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        log_p = b - tl.load(lse_t_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        p = tl.exp(log_p)
        c = log_p - log_q if ENTROPY else -log_q
        loss = tl.load(loss_ptr + offs_m, mask=mask_m, other=0.0)
        h = tl.where(counts, dout[:, None] * (p * (c - loss[:, None])), 0.0)
        tl.store(h_ptr + offs_w, h.to(h_ptr.dtype.element_ty), mask=stored)
    else:
        positive = tl.load(positives_ptr + offs_m, mask=mask_m, other=0)
        p = tl.where((first + offs_n)[None, :] == positive[:, None], 1.0, 0.0)
        dout = tl.where((positive >= 0) & (positive < counting), dout, float("nan"))
    if STUDENT:
        g = tl.where(counts, dout[:, None] * (tl.exp(log_q) - p), 0.0)
        tl.store(g_ptr + offs_w, g.to(g_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _relational_kl_bwd_kernel_product(
    a_ptr,  # [M, K]
    x_ptr,  # [K, N]
    a2_ptr,  # [M, K] of the same strides, or unused
    x2_ptr,  # [K, N], or unused
    scale_ptr,  # [K] fp32, or unused
    num_keys_ptr,  # [] int64, or unused
    out_ptr,  # [splits, M, N] fp32
    M,
    N,
    K,
    split_k,  # length of a split; a multiple of BLOCK_K
    stride_am,
    stride_ak,
    stride_xk,
    stride_xn,
    stride_x2k,
    stride_x2n,
    HAS_SCALE: tl.constexpr,
    HAS_NUM_KEYS: tl.constexpr,  # a contraction over keys of which the first count
    TWO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(scale a) x, plus a2 x2 if TWO."""
    offs_m, offs_n, split = split_tile(M, BLOCK_M, BLOCK_N)
    rows = offs_m.to(tl.int64)[:, None] * stride_am
    k_first = split * split_k
    counting = number_of_keys(num_keys_ptr, K, HAS_NUM_KEYS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k_first, tl.minimum(k_first + split_k, counting), BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask_k = ks < counting
        mask_a = (offs_m < M)[:, None] & mask_k[None, :]
        mask_x = (offs_n < N)[None, :] & mask_k[:, None]
        columns = ks.to(tl.int64)
        a = tl.load(a_ptr + rows + columns[None, :] * stride_ak, mask=mask_a, other=0.0)
        if HAS_SCALE:
            a = (a * tl.load(scale_ptr + ks, mask=mask_k, other=0.0)[None, :]).to(a.dtype)
        x_ptrs = x_ptr + columns[:, None] * stride_xk + offs_n.to(tl.int64)[None, :] * stride_xn
        acc = dot(a, tl.load(x_ptrs, mask=mask_x, other=0.0).to(a.dtype), acc, PRECISION)
        if TWO:
            a = tl.load(a2_ptr + rows + columns[None, :] * stride_ak, mask=mask_a, other=0.0)
            x_ptrs = (
                x2_ptr + columns[:, None] * stride_x2k + offs_n.to(tl.int64)[None, :] * stride_x2n
            )
            acc = dot(a, tl.load(x_ptrs, mask=mask_x, other=0.0).to(a.dtype), acc, PRECISION)
    store_split(out_ptr, acc, split, offs_m, offs_n, M, N)
