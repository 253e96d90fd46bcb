# SPDX-License-Identifier: Apache-2.0
"""Kernels of pkt. One program takes a tile of rows against a stretch of columns; weights of the
gradient leave it as a chunk that a second product reads while it is in the L2 cache."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.distances import close_share
from kdkernels.triton.common.dots import dot
from kdkernels.triton.common.exp_math import two_atanh
from kdkernels.triton.common.jit import kernel

# Rows of the table of numbers per feature row, fp32 [8, B]: of student and teacher 1 / (|x| + e),
# 1 - |u| or squared norms, 1 / Z; of the student r, and of cosine |x|.
SCALE, SELF, INVERSE, LOST, NORM = (tl.constexpr(index) for index in (0, 2, 4, 6, 7))


@triton.jit
def _products(
    x_ptr,  # [B, D]
    offs_m,
    offs_n,
    D,
    stride_m,
    stride_d,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x x^T of a tile, fp32."""
    # int64: a row number times a row stride passes 2**31 on large inputs
    rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_m
    cols = x_ptr + offs_n.to(tl.int64)[None, :] * stride_m
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        step = ks.to(tl.int64) * stride_d
        a = tl.load(rows + step[None, :], mask=(ks < D)[None, :], other=0.0)
        b = tl.load(cols + step[:, None], mask=(ks < D)[:, None], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _apart(offs_m, offs_n):
    """0 on the diagonal, 1 elsewhere."""
    return tl.minimum(tl.abs(offs_m[:, None] - offs_n[None, :]), 1).to(tl.float32)


@triton.jit
def _cosines(product, scale_i, scale_j, self_i, self_j):
    k = 0.5 * (product * scale_i[:, None] * scale_j[None, :] + 1.0)
    floor = 0.5 * (self_i[:, None] + self_j[None, :] - self_i[:, None] * self_j[None, :])
    return tl.where(k < floor, floor, k)  # keeps NaN


@triton.jit
def _distances(
    product,  # [m, n], of centred rows
    given_ptr,  # [B, D], the rows as they were given
    self_i,
    self_j,
    offs_m,
    offs_n,
    D,
    stride_m,
    stride_d,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(The roots that K of student_t is made of; whether different rows are so close that products
    would lose them, and all of them come from differences.)"""
    size = self_i[:, None] + self_j[None, :]
    d2 = size - 2.0 * product
    # by arithmetic: a mask per element takes more scalar registers than AMD GPUs have
    apart = _apart(offs_m, offs_n)
    close = (tl.min((d2 - close_share(given_ptr, D) * size) * apart) < 0.0).to(tl.int32)
    if close != 0:
        rows = given_ptr + offs_m.to(tl.int64) * stride_m
        cols = given_ptr + offs_n.to(tl.int64) * stride_m
        d2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for column in range(0, D):
            step = tl.cast(column, tl.int64) * stride_d
            x = tl.load(rows + step).to(tl.float32)
            y = tl.load(cols + step).to(tl.float32)
            difference = x[:, None] - y[None, :]
            d2 += difference * difference
    # at least 0, and 0 on the diagonal, where NaN stays
    d2 = 0.5 * (d2 + tl.abs(d2)) * apart
    return tl.sqrt_rn(d2 + 1e-6), close


@triton.jit
def _log_ratio(a, b):
    """log(a / b), relative to itself good near 1 too, where the hardware's logarithm is not."""
    s = (a - b) / (a + b)
    return tl.where(tl.abs(s) <= 0.3333, two_atanh(s), tl.log(a / b))


@triton.jit
def _term(p, q, KL: tl.constexpr):
    if KL:
        return q * _log_ratio(q + 1e-7, p + 1e-7)
    else:
        return (q - p) * _log_ratio(q, p)


@triton.jit
def _slope(p, q, KL: tl.constexpr):
    """The derivative of a term by p, with "kl" plus 1, which changes no gradient."""
    if KL:
        return ((p - q) + 1e-7) / (p + 1e-7)
    else:
        return (p - q) / p - _log_ratio(q, p)


@kernel
def _pkt_tiles_kernel(
    s_ptr,  # [B, D_s], of student_t centred
    t_ptr,  # [B, D_t]
    given_s_ptr,  # of the strides of s and t, not centred
    given_t_ptr,
    rows_ptr,  # [8, B] fp32
    sums_ptr,  # [2, splits, B] fp32: sums of K of both sides, or losses and r
    w_ptr,  # [rows, B], or unused: weights of a chunk of rows
    close_ptr,  # [tiles of rows, tiles of B] int32, student_t: which of the student are close
    first,  # of the chunk
    last,
    B,
    D_s,
    D_t,
    split_n,  # columns of a split; a multiple of BLOCK_N
    splits,
    stride_sm,
    stride_sd,
    stride_tm,
    stride_td,
    COSINE: tl.constexpr,
    KL: tl.constexpr,
    SUMS: tl.constexpr,  # which results are asked for
    LOSS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = first + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    mask_m = offs_m < last
    # Past the end comes the last row again, so that loads need no mask of rows, and AMD GPUs, which
    # hold few, have registers for those that stay.
    at_m = tl.minimum(offs_m, B - 1)
    of_row = rows_ptr + at_m
    width = B.to(tl.int64)
    self_s = tl.load(of_row + SELF * width)
    self_t = tl.load(of_row + (SELF + 1) * width)
    scale_s = tl.load(of_row + SCALE * width)
    scale_t = tl.load(of_row + (SCALE + 1) * width)
    if LOSS or WEIGHTS:
        inverse_s = tl.load(of_row + INVERSE * width)
        inverse_t = tl.load(of_row + (INVERSE + 1) * width)
    first_sum = tl.zeros((BLOCK_M,), tl.float32)
    second_sum = tl.zeros((BLOCK_M,), tl.float32)
    for j in range(split * split_n, tl.minimum((split + 1) * split_n, B), BLOCK_N):
        offs_n = j + tl.arange(0, BLOCK_N)
        valid = mask_m[:, None] & (offs_n < B)[None, :]
        at_n = tl.minimum(offs_n, B - 1)
        of_col = rows_ptr + at_n
        scale_j = tl.load(of_col + SCALE * width)
        self_j = tl.load(of_col + SELF * width)
        product = _products(
            s_ptr, at_m, at_n, D_s, stride_sm, stride_sd,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if COSINE:
            k_s = _cosines(product, scale_s, scale_j, self_s, self_j)
        else:
            d_s, close = _distances(
                product, given_s_ptr, self_s, self_j, at_m, at_n, D_s,
                stride_sm, stride_sd, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            k_s = 1.0 / (1.0 + d_s)
        other_scale_j = tl.load(of_col + (SCALE + 1) * width)
        other_self_j = tl.load(of_col + (SELF + 1) * width)
        product = _products(
            t_ptr, at_m, at_n, D_t, stride_tm, stride_td,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if COSINE:
            k_t = _cosines(product, scale_t, other_scale_j, self_t, other_self_j)
        else:
            d_t, _ = _distances(
                product, given_t_ptr, self_t, other_self_j, at_m, at_n, D_t,
                stride_tm, stride_td, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            k_t = 1.0 / (1.0 + d_t)
        if SUMS:
            first_sum += tl.sum(tl.where(valid, k_s, 0.0), 1)
            second_sum += tl.sum(tl.where(valid, k_t, 0.0), 1)
        if LOSS or WEIGHTS:
            p = k_s * inverse_s[:, None]
            q = k_t * inverse_t[:, None]
            slope = _slope(p, q, KL)
        if LOSS:
            first_sum += tl.sum(tl.where(valid, _term(p, q, KL), 0.0), 1)
            second_sum += tl.sum(tl.where(valid, p * slope, 0.0), 1)
        if WEIGHTS:
            inverse_sj = tl.load(of_col + INVERSE * width)
            inverse_tj = tl.load(of_col + (INVERSE + 1) * width)
            across = _slope(k_s * inverse_sj[None, :], k_t * inverse_tj[None, :], KL)
            if not COSINE:
                lost = tl.load(of_row + LOST * width)
                slope -= lost[:, None]
                across -= tl.load(of_col + LOST * width)[None, :]
            w = slope * inverse_s[:, None] + across * inverse_sj[None, :]
            if COSINE:
                w *= scale_j[None, :]
            else:  # 2 dK / d(d^2)
                w *= -k_s * k_s / d_s * _apart(at_m, at_n)
                tiles = tl.program_id(0) * tl.cdiv(B, BLOCK_N)
                tl.store(close_ptr + tiles + j // BLOCK_N, close)
            w = tl.where(valid, w, 0.0).to(w_ptr.dtype.element_ty)
            at = w_ptr + (offs_m - first).to(tl.int64)[:, None] * B + offs_n[None, :]
            tl.store(at, w, mask=valid)
    at = sums_ptr + split.to(tl.int64) * width + offs_m
    if SUMS or LOSS:
        tl.store(at, first_sum, mask=mask_m)
        tl.store(at + splits * width, second_sum, mask=mask_m)
