# SPDX-License-Identifier: Apache-2.0
"""Kernels of the second sweep of relational_kl: derivatives by logits of a chunk of rows or keys,
and their products with what each side's logits come from."""

from __future__ import annotations

import triton.language as tl

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.product import number_that_count
from kdkernels.triton.relational_kl.kernels import logits, second_bank
from kdkernels.triton.relational_kl.row_kernels import LSE_S, LSE_T, SCALE_S, SCALE_T


@kernel(counts=("first_row", "first_key"))
def _relational_kl_derivatives_kernel(
    x_ptr,  # [B, D] contiguous
    y_ptr,  # [B, E] contiguous, or None
    keys_ptr,  # [K, D] contiguous
    teacher_keys_ptr,  # [K, E] contiguous, or None where both sides have the same keys
    key_scales_ptr,  # [1 or 2, K] fp32, or None
    numbers_ptr,  # [7, B] fp32
    positives_ptr,  # [B] int64, or None
    exclude_ptr,  # [B] int64, [B, K] bool with MASK, or None
    num_keys_ptr,  # [] int64, or None
    loss_ptr,  # [B] fp32
    dout_ptr,  # [B] fp32
    g_ptr,  # [rows, keys], or None: dout times derivatives by the student's logits
    h_ptr,  # [rows, keys], or None: by the teacher's
    first_row,
    first_key,
    rows,  # from there on
    keys,  # from there on
    B,
    K,
    D,
    E,
    stride_dout,
    BY_ROWS: tl.constexpr,
    MASK: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Derivatives, times the scales of the rows where a product with them follows (BY_ROWS)."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    local_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    local_n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m, offs_n = first_row + local_m, first_key + local_n
    last_m, last_n = first_row + rows, first_key + keys
    mask_m = local_m < rows
    stored = mask_m[:, None] & (local_n < keys)[None, :]
    of_row = numbers_ptr + offs_m.to(tl.int64)
    step = tl.cast(B, tl.int64)
    a = logits(
        x_ptr, keys_ptr, numbers_ptr + SCALE_S * step, key_scales_ptr, offs_m, offs_n, last_m,
        last_n, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if y_ptr is not None:
        rows_t_ptr = numbers_ptr + SCALE_T * step
        if teacher_keys_ptr is None:
            b = logits(
                y_ptr, keys_ptr, rows_t_ptr, key_scales_ptr, offs_m, offs_n, last_m, last_n, D,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            b = logits(
                y_ptr, teacher_keys_ptr, rows_t_ptr, second_bank(key_scales_ptr, K), offs_m,
                offs_n, last_m, last_n, E, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    # the products are made: what is loaded or decided before them would take registers from them
    counting = number_that_count(num_keys_ptr, K, num_keys_ptr is not None)
    counts = mask_m[:, None] & (offs_n < tl.minimum(counting, last_n))[None, :]
    if exclude_ptr is not None:
        if MASK:
            at = exclude_ptr + offs_m.to(tl.int64)[:, None] * K + offs_n[None, :]
            counts &= tl.load(at, mask=stored, other=1) == 0
        else:
            exclude = tl.load(exclude_ptr + offs_m, mask=mask_m, other=-1)
            counts &= offs_n[None, :] != exclude[:, None]
    at_w = local_m.to(tl.int64)[:, None] * keys + local_n[None, :]
    dout = tl.load(dout_ptr + offs_m * stride_dout, mask=mask_m, other=0.0)
    log_q = a - tl.load(of_row + LSE_S * step, mask=mask_m, other=0.0)[:, None]
    if y_ptr is not None:
        log_p = b - tl.load(of_row + LSE_T * step, mask=mask_m, other=0.0)[:, None]
        p = tl.exp(log_p)
        c = log_p - log_q if ENTROPY else -log_q
        loss = tl.load(loss_ptr + offs_m, mask=mask_m, other=0.0)
        h = dout[:, None] * (p * (c - loss[:, None]))
        if BY_ROWS:
            h *= tl.load(of_row + SCALE_T * step, mask=mask_m, other=0.0)[:, None]
        h = tl.where(counts, h, 0.0)
        tl.store(h_ptr + at_w, h.to(h_ptr.dtype.element_ty), mask=stored)
    elif positives_ptr is not None:
        positive = tl.load(positives_ptr + offs_m, mask=mask_m, other=0)
        p = tl.where(offs_n[None, :] == positive[:, None], 1.0, 0.0)
        dout = tl.where((positive >= 0) & (positive < counting), dout, float("nan"))
    if g_ptr is not None:  # by rows only: the forward has the student's gradient
        q = tl.exp(log_q)
        if y_ptr is not None or positives_ptr is not None:
            q -= p
        by = dout * tl.load(of_row + SCALE_S * step, mask=mask_m, other=0.0)
        g = tl.where(counts, by[:, None] * q, 0.0)
        tl.store(g_ptr + at_w, g.to(g_ptr.dtype.element_ty), mask=stored)
