# SPDX-License-Identifier: Apache-2.0
"""Kernels of correlation: softmax and moments of rows, moments of columns in splits of the rows,
their merge, and loss and gradient. Probabilities are computed again in each and never stored."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.jit import kernel

# The table of numbers per row, fp32 [7, B]: maxima and sums of both softmaxes, rho, and
# the factors self_ and other of the gradient.
MAX, SUM, RHO, SELF, OTHER = (tl.constexpr(index) for index in (0, 2, 4, 5, 6))


@triton.jit
def _logits(x_ptr, rows, cols, valid, stride_row, stride_col, temperature):
    # int64: a row number times a row stride passes 2**31 on large inputs
    at = x_ptr + rows.to(tl.int64)[:, None] * stride_row
    at += cols.to(tl.int64)[None, :] * stride_col
    return tl.load(at, mask=valid, other=-float("inf")).to(tl.float32) / temperature


@triton.jit
def _add_logits(z, most, total):
    """Online maximum and sum of exp(z - maximum); a sum of NaN stays one. Before the first class
    that is not ruled out, exp would be of inf - inf, and all that counts is NaN."""
    now = tl.maximum(most, tl.max(z, 1))
    seen = now > -float("inf")
    kept = tl.where(seen, tl.exp(most - now), 1.0)
    terms = tl.where(seen[:, None], tl.exp(z - now[:, None]), tl.where(z == z, 0.0, z))
    return now, total * kept + tl.sum(terms, 1)


@triton.jit
def _correlate(aa, bb, ab, eps):
    """(rho, self_, other): d rho / d a = other b - self_ a"""
    norm_a = tl.sqrt_rn(aa)
    norm_b = tl.sqrt_rn(bb)
    den = norm_a * norm_b + eps
    rho = ab / den
    return rho, tl.where(norm_a > 0.0, rho * norm_b / (norm_a * den), 0.0), 1.0 / den


@kernel
def _correlation_rows_kernel(
    s_ptr,  # [B, C]
    t_ptr,  # [B, C]
    rows_ptr,  # [7, B] fp32
    B,
    C,
    temperature,
    centre,
    eps,
    stride_sm,
    stride_sc,
    stride_tm,
    stride_tc,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < B
    max_s = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    max_t = max_s
    sum_s = tl.zeros((BLOCK_M,), tl.float32)
    sum_t = sum_s
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        valid = mask_m[:, None] & (offs_c < C)[None, :]
        z = _logits(s_ptr, offs_m, offs_c, valid, stride_sm, stride_sc, temperature)
        max_s, sum_s = _add_logits(z, max_s, sum_s)
        z = _logits(t_ptr, offs_m, offs_c, valid, stride_tm, stride_tc, temperature)
        max_t, sum_t = _add_logits(z, max_t, sum_t)
    aa = tl.zeros((BLOCK_M,), tl.float32)
    bb = aa
    ab = aa
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        valid = mask_m[:, None] & (offs_c < C)[None, :]
        z = _logits(s_ptr, offs_m, offs_c, valid, stride_sm, stride_sc, temperature)
        a = tl.exp(z - max_s[:, None]) / sum_s[:, None] - centre
        z = _logits(t_ptr, offs_m, offs_c, valid, stride_tm, stride_tc, temperature)
        b = tl.exp(z - max_t[:, None]) / sum_t[:, None] - centre
        aa += tl.sum(tl.where(valid, a * a, 0.0), 1)
        bb += tl.sum(tl.where(valid, b * b, 0.0), 1)
        ab += tl.sum(tl.where(valid, a * b, 0.0), 1)
    rho, self_, other = _correlate(aa, bb, ab, eps)
    at = rows_ptr + offs_m
    width = B.to(tl.int64)
    tl.store(at + MAX * width, max_s, mask=mask_m)
    tl.store(at + (MAX + 1) * width, max_t, mask=mask_m)
    tl.store(at + SUM * width, sum_s, mask=mask_m)
    tl.store(at + (SUM + 1) * width, sum_t, mask=mask_m)
    tl.store(at + RHO * width, rho, mask=mask_m)
    tl.store(at + SELF * width, self_, mask=mask_m)
    tl.store(at + OTHER * width, other, mask=mask_m)


@triton.jit
def _probabilities(
    x_ptr, rows_ptr, rows, cols, valid, B, temperature, stride_row, stride_col, SIDE: tl.constexpr
):
    width = B.to(tl.int64)
    most = tl.load(rows_ptr + (MAX + SIDE) * width + rows, mask=rows < B, other=0.0)
    total = tl.load(rows_ptr + (SUM + SIDE) * width + rows, mask=rows < B, other=1.0)
    z = _logits(x_ptr, rows, cols, valid, stride_row, stride_col, temperature)
    return tl.exp(z - most[:, None]) / total[:, None]


@kernel
def _correlation_columns_kernel(
    s_ptr,  # [B, C]
    t_ptr,  # [B, C]
    rows_ptr,  # [7, B] fp32
    moments_ptr,  # [splits, 5, C] fp32: means, aa, bb, ab of a split's rows
    B,
    C,
    temperature,
    split_m,  # rows of a split; a multiple of BLOCK_M
    stride_sm,
    stride_sc,
    stride_tm,
    stride_tc,
    CENTERED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    split = tl.program_id(1)
    mean_a = tl.zeros((BLOCK_C,), tl.float32)
    mean_b = mean_a
    aa = mean_a
    bb = mean_a
    ab = mean_a
    before = 0.0
    if CENTERED:  # all from the batch's first row on, so that equal rows have moments of exactly 0
        first = tl.zeros((1,), tl.int32)
        one = mask_c[None, :]
        first_a = _probabilities(
            s_ptr, rows_ptr, first, offs_c, one, B, temperature, stride_sm, stride_sc, 0
        )
        first_b = _probabilities(
            t_ptr, rows_ptr, first, offs_c, one, B, temperature, stride_tm, stride_tc, 1
        )
    for m in range(split * split_m, tl.minimum((split + 1) * split_m, B), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        valid = (offs_m < B)[:, None] & mask_c[None, :]
        a = _probabilities(
            s_ptr, rows_ptr, offs_m, offs_c, valid, B, temperature, stride_sm, stride_sc, 0
        )
        b = _probabilities(
            t_ptr, rows_ptr, offs_m, offs_c, valid, B, temperature, stride_tm, stride_tc, 1
        )
        if CENTERED:
            count = tl.minimum(B - m, BLOCK_M).to(tl.float32)
            a = tl.where(valid, a - first_a, 0.0)
            b = tl.where(valid, b - first_b, 0.0)
            tile_a = tl.sum(a, 0) / count
            tile_b = tl.sum(b, 0) / count
            a = tl.where(valid, a - tile_a[None, :], 0.0)
            b = tl.where(valid, b - tile_b[None, :], 0.0)
            share = count / (before + count)
            delta_a = tile_a - mean_a
            delta_b = tile_b - mean_b
            aa += before * share * delta_a * delta_a
            bb += before * share * delta_b * delta_b
            ab += before * share * delta_a * delta_b
            mean_a += share * delta_a
            mean_b += share * delta_b
            before += count
        aa += tl.sum(tl.where(valid, a * a, 0.0), 0)
        bb += tl.sum(tl.where(valid, b * b, 0.0), 0)
        ab += tl.sum(tl.where(valid, a * b, 0.0), 0)
    at = moments_ptr + split.to(tl.int64) * 5 * C + offs_c
    tl.store(at, mean_a, mask=mask_c)
    tl.store(at + C, mean_b, mask=mask_c)
    tl.store(at + 2 * C, aa, mask=mask_c)
    tl.store(at + 3 * C, bb, mask=mask_c)
    tl.store(at + 4 * C, ab, mask=mask_c)


@kernel
def _correlation_merge_kernel(
    s_ptr,  # [B, C]
    t_ptr,  # [B, C]
    rows_ptr,  # [7, B] fp32
    moments_ptr,  # [splits, 5, C] fp32
    columns_ptr,  # [5, C] fp32: means, rho, self_, other
    B,
    C,
    temperature,
    eps,
    split_m,
    splits,
    stride_sc,
    stride_tc,
    CENTERED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean_a = tl.load(moments_ptr + offs_c, mask=mask_c, other=0.0)
    mean_b = tl.load(moments_ptr + C + offs_c, mask=mask_c, other=0.0)
    aa = tl.load(moments_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    bb = tl.load(moments_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    ab = tl.load(moments_ptr + 4 * C + offs_c, mask=mask_c, other=0.0)
    for split in range(1, splits):
        at = moments_ptr + split * 5 * C + offs_c
        before = (split * split_m).to(tl.float32)
        count = tl.minimum(B - split * split_m, split_m).to(tl.float32)
        share = count / (before + count)
        weight = before * share
        delta_a = tl.load(at, mask=mask_c, other=0.0) - mean_a
        delta_b = tl.load(at + C, mask=mask_c, other=0.0) - mean_b
        aa += tl.load(at + 2 * C, mask=mask_c, other=0.0) + weight * delta_a * delta_a
        bb += tl.load(at + 3 * C, mask=mask_c, other=0.0) + weight * delta_b * delta_b
        ab += tl.load(at + 4 * C, mask=mask_c, other=0.0) + weight * delta_a * delta_b
        mean_a += share * delta_a
        mean_b += share * delta_b
    if CENTERED:
        first = tl.zeros((1,), tl.int32)
        one = mask_c[None, :]
        first_a = _probabilities(
            s_ptr, rows_ptr, first, offs_c, one, B, temperature, 0, stride_sc, 0
        )
        first_b = _probabilities(
            t_ptr, rows_ptr, first, offs_c, one, B, temperature, 0, stride_tc, 1
        )
        mean_a += tl.sum(first_a, 0)
        mean_b += tl.sum(first_b, 0)
    rho, self_, other = _correlate(aa, bb, ab, eps)
    at = columns_ptr + offs_c
    tl.store(at, mean_a, mask=mask_c)
    tl.store(at + C, mean_b, mask=mask_c)
    tl.store(at + 2 * C, rho, mask=mask_c)
    tl.store(at + 3 * C, self_, mask=mask_c)
    tl.store(at + 4 * C, other, mask=mask_c)


@triton.jit
def _derivatives(
    s_ptr, t_ptr, rows_ptr, columns_ptr, offs_m, offs_c, B, C, temperature, centre, row_scale,
    column_scale, stride_sm, stride_sc, stride_tm, stride_tc,
):  # fmt: skip
    """(student's probabilities, derivatives by them) of a tile; 0 beyond its ends."""
    mask_c = offs_c < C
    mask_m = offs_m < B
    valid = mask_m[:, None] & mask_c[None, :]
    a = _probabilities(
        s_ptr, rows_ptr, offs_m, offs_c, valid, B, temperature, stride_sm, stride_sc, 0
    )
    b = _probabilities(
        t_ptr, rows_ptr, offs_m, offs_c, valid, B, temperature, stride_tm, stride_tc, 1
    )
    width = B.to(tl.int64)
    self_ = row_scale * tl.load(rows_ptr + SELF * width + offs_m, mask=mask_m, other=0.0)
    other = row_scale * tl.load(rows_ptr + OTHER * width + offs_m, mask=mask_m, other=0.0)
    dy = (a - centre) * self_[:, None] - (b - centre) * other[:, None]
    mean_a = tl.load(columns_ptr + offs_c, mask=mask_c, other=0.0)
    mean_b = tl.load(columns_ptr + C + offs_c, mask=mask_c, other=0.0)
    self_ = column_scale * tl.load(columns_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    other = column_scale * tl.load(columns_ptr + 4 * C + offs_c, mask=mask_c, other=0.0)
    dy += (a - mean_a[None, :]) * self_[None, :] - (b - mean_b[None, :]) * other[None, :]
    return tl.where(valid, a, 0.0), tl.where(valid, dy, 0.0)


@triton.jit
def _sum_of_losses(rho_ptr, count, BLOCK: tl.constexpr):
    """Of 1 - rho, in fp64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, count, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        rho = tl.load(rho_ptr + offs, mask=offs < count, other=1.0)
        total += (1.0 - rho).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _store_derivatives(
    s_ptr, t_ptr, rows_ptr, columns_ptr, dz_ptr, B, C, temperature, centre, row_scale,
    column_scale, stride_sm, stride_sc, stride_tm, stride_tc, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.zeros((BLOCK_M,), tl.float32)
    for c in range(0, C, BLOCK_C):
        a, dy = _derivatives(
            s_ptr, t_ptr, rows_ptr, columns_ptr, offs_m, c + tl.arange(0, BLOCK_C), B, C,
            temperature, centre, row_scale, column_scale, stride_sm, stride_sc, stride_tm,
            stride_tc,
        )  # fmt: skip
        inner += tl.sum(a * dy, 1)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        a, dy = _derivatives(
            s_ptr, t_ptr, rows_ptr, columns_ptr, offs_m, offs_c, B, C,
            temperature, centre, row_scale, column_scale, stride_sm, stride_sc, stride_tm,
            stride_tc,
        )  # fmt: skip
        tl.store(
            dz_ptr + offs_m.to(tl.int64)[:, None] * C + offs_c[None, :],
            a * (dy - inner[:, None]),
            mask=(offs_m < B)[:, None] & (offs_c < C)[None, :],
        )


@kernel
def _correlation_gradient_kernel(
    s_ptr,  # [B, C]
    t_ptr,  # [B, C]
    rows_ptr,  # [7, B] fp32
    columns_ptr,  # [5, C] fp32
    dz_ptr,  # [B, C] fp32, with DERIVATIVE
    loss_ptr,  # [] fp32
    B,
    C,
    temperature,
    centre,
    row_scale,  # of the derivative by a row's probabilities over temperature; the loss has one more
    column_scale,
    stride_sm,
    stride_sc,
    stride_tm,
    stride_tc,
    DERIVATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The loss, by the first program, and its derivatives by the student's logits."""
    if tl.program_id(0) == 0:
        by_row = _sum_of_losses(rows_ptr + RHO * B.to(tl.int64), B, BLOCK)
        by_column = _sum_of_losses(columns_ptr + 2 * C, C, BLOCK)
        loss = temperature * (row_scale * by_row + column_scale * by_column)
        tl.store(loss_ptr, loss.to(tl.float32))
    if DERIVATIVE:
        _store_derivatives(
            s_ptr, t_ptr, rows_ptr, columns_ptr, dz_ptr, B, C, temperature, centre, row_scale,
            column_scale, stride_sm, stride_sc, stride_tm, stride_tc, BLOCK_M, BLOCK_C,
        )  # fmt: skip
