# SPDX-License-Identifier: Apache-2.0
"""Kernels of the second sweep of relational_kl: derivatives by logits of a chunk of rows or keys,
and their products with what each side's logits come from."""

from __future__ import annotations

import triton.language as tl

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.product import number_that_count
from kdkernels.triton.relational_kl.kernels import logits


@kernel
def _relational_kl_derivatives_kernel(
    x_ptr,  # [B, D] fp32, contiguous
    y_ptr,  # [B, E] fp32, contiguous, or unused
    keys_ptr,  # [K, D], from key `first` on
    teacher_keys_ptr,  # [K, E], or unused
    scale_ptr,  # [K] fp32, or unused
    teacher_scale_ptr,  # [K] fp32, or unused
    positives_ptr,  # [B] int64, or unused
    exclude_ptr,  # [B] int64, [B, total] bool with MASK, or unused
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
    POSITIVES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    MASK: tl.constexpr,
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
    counting = number_that_count(num_keys_ptr, total, HAS_NUM_KEYS)
    counts = mask_m[:, None] & (offs_n < tl.minimum(counting - first, K))[None, :]
    if MASK:
        at = exclude_ptr + offs_m.to(tl.int64)[:, None] * total + (first + offs_n)[None, :]
        counts &= tl.load(at, mask=stored, other=1) == 0
    elif HAS_EXCLUDE:
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
    elif POSITIVES:
        positive = tl.load(positives_ptr + offs_m, mask=mask_m, other=0)
        p = tl.where((first + offs_n)[None, :] == positive[:, None], 1.0, 0.0)
        dout = tl.where((positive >= 0) & (positive < counting), dout, float("nan"))
    if STUDENT:
        q = tl.exp(log_q)
        if TEACHER or POSITIVES:
            q -= p
        g = tl.where(counts, dout[:, None] * q, 0.0)
        tl.store(g_ptr + offs_w, g.to(g_ptr.dtype.element_ty), mask=stored)
