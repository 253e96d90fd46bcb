# SPDX-License-Identifier: Apache-2.0
"""Kernels of gram_mse that its algorithms share.

A product reads its operands once per tile row or column; split contractions write fp32 partial sums
that are added in a fixed order. Everything else here reads and writes each element once or twice.
"""

# Constants and values of the device cannot be joined by `and` in Triton.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.dots import dot, dot_split
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.norms import EPS
from kdkernels.triton.common.product import upper_tile


@triton.jit
def accumulate(
    acc,
    x_ptr,  # [M, K]
    y_ptr,  # [N, K]
    w_ptr,  # [K] fp32 or fp64, or unused
    offs_m,
    offs_n,
    M,
    N,
    K,
    k_first,
    k_last,
    stride_xm,
    stride_xk,
    stride_ym,
    stride_yk,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + the sum over k in [k_first, k_last) of w_k x_mk y_nk."""
    offs_k = tl.arange(0, BLOCK_K)
    # int64: a row number times a row stride passes 2**31 on large inputs
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    y_ptrs = y_ptr + offs_n.to(tl.int64)[None, :] * stride_ym
    for k in range(k_first, k_last, BLOCK_K):
        ks = k + offs_k
        mask_k = ks < K
        x = tl.load(
            x_ptrs + ks.to(tl.int64)[None, :] * stride_xk,
            mask=(offs_m < M)[:, None] & mask_k[None, :],
            other=0.0,
        )
        y = tl.load(
            y_ptrs + ks.to(tl.int64)[:, None] * stride_yk,
            mask=(offs_n < N)[None, :] & mask_k[:, None],
            other=0.0,
        )
        if WEIGHTED:
            w = tl.load(w_ptr + ks, mask=mask_k, other=0.0).to(tl.float32)
            acc = dot_split(x.to(tl.float32) * w[None, :], y, acc, PRECISION)
        else:
            acc = dot(x, y, acc, PRECISION)
    return acc


@triton.jit
def _store_product(
    out_ptr,  # [M, N] fp32
    x_ptr,  # [M, K]
    y_ptr,  # [N, K]
    w_ptr,  # [K] fp32 or fp64, or unused
    i,
    j,
    M,
    N,
    K,
    split_k,
    stride_xm,
    stride_xk,
    stride_ym,
    stride_yk,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = i * BLOCK + tl.arange(0, BLOCK)
    offs_n = j * BLOCK + tl.arange(0, BLOCK)
    k_first = tl.program_id(1) * split_k
    acc = accumulate(
        tl.zeros((BLOCK, BLOCK), tl.float32), x_ptr, y_ptr, w_ptr, offs_m, offs_n, M, N, K, k_first,
        tl.minimum(k_first + split_k, K), stride_xm, stride_xk, stride_ym, stride_yk, WEIGHTED,
        PRECISION, BLOCK_K,
    )  # fmt: skip
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :], acc, mask=mask)


@kernel(counts=("w_ss_ptr", "w_tt_ptr", "w_ts_ptr", "stride_wg"))
def _gram_mse_product_kernel(
    s_ptr,  # [G, M_s, K_s]
    t_ptr,  # [G, M_t, K_t]
    w_ss_ptr,  # [G, K_s] fp32 or fp64, groups stride_wg apart; likewise the next two
    w_tt_ptr,  # [G, K_t]
    w_ts_ptr,  # [G, K_s]
    ss_ptr,  # [splits, G, M_s, M_s] fp32, tiles on or above the diagonal: s diag(w_ss) s^T
    tt_ptr,  # [splits, G, M_t, M_t] fp32, tiles on or above the diagonal: t diag(w_tt) t^T
    ts_ptr,  # [splits, G, M_t, M_s] fp32: t diag(w_ts) s^T
    G,
    M_s,
    M_t,
    K_s,
    K_t,
    split_s,  # length of a split; a multiple of BLOCK_K
    split_t,
    stride_sg,
    stride_sm,
    stride_sk,
    stride_tg,
    stride_tm,
    stride_tk,
    stride_wg,
    SS: tl.constexpr,  # which of the three products to compute
    TT: tl.constexpr,
    TS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n_s = tl.cdiv(M_s, BLOCK)
    n_t = tl.cdiv(M_t, BLOCK)
    tiles_ss = n_s * (n_s + 1) // 2 if SS else 0
    tiles_tt = n_t * (n_t + 1) // 2 if TT else 0
    tiles_ts = n_s * n_t if TS else 0
    tiles = tiles_ss + tiles_tt + tiles_ts
    tile = tl.program_id(0) % tiles
    g = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1).to(tl.int64) * G + g
    s_ptr += g * stride_sg
    t_ptr += g * stride_tg
    # one body per product, not one with selected strides: a unit stride must stay known
    if SS:
        if tile < tiles_ss:
            i, j = upper_tile(tile)
            _store_product(
                ss_ptr + part * M_s * M_s, s_ptr, s_ptr, w_ss_ptr + g * stride_wg, i, j, M_s, M_s,
                K_s, split_s, stride_sm, stride_sk, stride_sm, stride_sk, WEIGHTED, PRECISION,
                BLOCK, BLOCK_K,
            )  # fmt: skip
    if TT:
        if (tile >= tiles_ss) & (tile < tiles_ss + tiles_tt):
            i, j = upper_tile(tile - tiles_ss)
            _store_product(
                tt_ptr + part * M_t * M_t, t_ptr, t_ptr, w_tt_ptr + g * stride_wg, i, j, M_t, M_t,
                K_t, split_t, stride_tm, stride_tk, stride_tm, stride_tk, WEIGHTED, PRECISION,
                BLOCK, BLOCK_K,
            )  # fmt: skip
    if TS:
        if tile >= tiles_ss + tiles_tt:
            rest = tile - tiles_ss - tiles_tt
            _store_product(
                ts_ptr + part * M_t * M_s, t_ptr, s_ptr, w_ts_ptr + g * stride_wg, rest // n_s,
                rest % n_s, M_t, M_s, K_s, split_s, stride_tm, stride_tk, stride_sm, stride_sk,
                WEIGHTED, PRECISION, BLOCK, BLOCK_K,
            )  # fmt: skip


@triton.jit
def mirrored(rows, columns, N, BLOCK: tl.constexpr):
    """Offset of an element of a symmetric [N, N] matrix, stored in its upper tiles only."""
    upper = rows // BLOCK <= columns // BLOCK
    return tl.where(upper, rows, columns).to(tl.int64) * N + tl.where(upper, columns, rows)


@triton.jit
def _sum_splits(
    out_ptr,
    parts_ptr,
    start,
    M,
    N,
    G,
    splits,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    offs = start + tl.arange(0, ELEMENTS)
    per_group = tl.cast(M, tl.int64) * N
    mask = offs < per_group * G
    g = offs // per_group
    within = offs % per_group
    source = mirrored(within // N, within % N, N, BLOCK) if SYMMETRIC else within
    total = tl.zeros((ELEMENTS,), tl.float32)
    for split in range(splits):
        part = (g + tl.cast(split, tl.int64) * G) * per_group
        total += tl.load(parts_ptr + part + source, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total, mask=mask)


@kernel
def _gram_mse_reduce_kernel(
    ss_parts_ptr,  # [splits, G, M_s, M_s] fp32, as _gram_mse_product_kernel leaves them
    tt_parts_ptr,  # [splits, G, M_t, M_t]
    ts_parts_ptr,  # [splits, G, M_t, M_s]
    ss_ptr,  # [G, M_s, M_s] fp32, full; may be the parts if there is one split
    tt_ptr,  # [G, M_t, M_t]
    ts_ptr,  # [G, M_t, M_s]
    G,
    M_s,
    M_t,
    splits,
    SS: tl.constexpr,
    TT: tl.constexpr,
    TS: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ELEMENTS
    which = tl.program_id(1)
    if SS:
        if which == 0:
            _sum_splits(ss_ptr, ss_parts_ptr, start, M_s, M_s, G, splits, True, BLOCK, ELEMENTS)
    if TT:
        if which == 1:
            _sum_splits(tt_ptr, tt_parts_ptr, start, M_t, M_t, G, splits, True, BLOCK, ELEMENTS)
    if TS:
        if which == 2:
            _sum_splits(ts_ptr, ts_parts_ptr, start, M_t, M_s, G, splits, False, BLOCK, ELEMENTS)


@triton.jit
def _inverse_norms(
    x_ptr, rows, B, D, stride_b, stride_d, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    total = tl.zeros((ROWS,), tl.float32)
    for d in range(0, D, COLUMNS):
        offs_d = d + tl.arange(0, COLUMNS)
        x = tl.load(
            x_ptr + rows[:, None] * stride_b + offs_d.to(tl.int64)[None, :] * stride_d,
            mask=(rows < B)[:, None] & (offs_d < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(x * x, 1)
    norm = tl.sqrt_rn(total)
    return 1.0 / tl.where(norm < EPS, EPS, norm)  # the where keeps NaN


@kernel
def _gram_mse_norms_kernel(
    s_ptr,  # [G, B, D_s]
    t_ptr,  # [G, B, D_t]
    scale_ptr,  # [5, G, B] fp32: u, v, u^2, v^2, u v for u = 1 / |s_i|, v = 1 / |t_i|
    G,
    B,
    D_s,
    D_t,
    stride_sg,
    stride_sb,
    stride_sd,
    stride_tg,
    stride_tb,
    stride_td,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(B, ROWS)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    rows = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    u = _inverse_norms(s_ptr + g * stride_sg, rows, B, D_s, stride_sb, stride_sd, ROWS, COLUMNS)
    v = _inverse_norms(t_ptr + g * stride_tg, rows, B, D_t, stride_tb, stride_td, ROWS, COLUMNS)
    step = tl.cast(G, tl.int64) * B
    scale_ptrs = scale_ptr + g * B + rows
    tl.store(scale_ptrs, u, mask=rows < B)
    tl.store(scale_ptrs + step, v, mask=rows < B)
    tl.store(scale_ptrs + 2 * step, u * u, mask=rows < B)
    tl.store(scale_ptrs + 3 * step, v * v, mask=rows < B)
    tl.store(scale_ptrs + 4 * step, u * v, mask=rows < B)


@triton.jit
def store_coefficients(
    coef_ptr,  # [5, B] fp64: rows a, b_s, b_t, c_s, c_t
    loss_ptr,  # [B] fp32
    rows,
    B,
    r2,  # row sums in fp64: of A^2, K^2, A K, |A|, |K|
    q2,
    x,
    l1_s,
    l1_t,
    L1: tl.constexpr,
):
    """Loss and coefficients of rows that are divided by their L2 or L1 norm."""
    if L1:
        norm_s = l1_s
        norm_t = l1_t
    else:
        norm_s = tl.sqrt(r2)
        norm_t = tl.sqrt(q2)
    r = tl.where(norm_s < EPS, EPS, norm_s)
    q = tl.where(norm_t < EPS, EPS, norm_t)
    square_s = r2 / r / r
    square_t = q2 / q / q
    cross = x / r / q
    # <dG_i, G_i> / 2, which the normalisation takes back from the gradient; nothing where the
    # clamp holds the norm
    back_s = tl.where(norm_s >= EPS, square_s - cross, 0.0)
    back_t = tl.where(norm_t >= EPS, square_t - cross, 0.0)
    if L1:
        b_s = 2.0 / r / r
        b_t = 2.0 / q / q
        c_s = -2.0 * back_s / r
        c_t = -2.0 * back_t / q
    else:
        b_s = 2.0 * (1.0 - back_s) / r / r
        b_t = 2.0 * (1.0 - back_t) / q / q
        c_s = tl.zeros_like(r)
        c_t = tl.zeros_like(q)
    loss = square_s + square_t - 2.0 * cross
    loss = tl.where(loss < 0.0, 0.0, loss)  # the where keeps NaN
    mask = rows < B
    tl.store(loss_ptr + rows, loss.to(tl.float32), mask=mask)
    tl.store(coef_ptr + rows, -2.0 / r / q, mask=mask)
    tl.store(coef_ptr + B + rows, b_s, mask=mask)
    tl.store(coef_ptr + 2 * B + rows, b_t, mask=mask)
    tl.store(coef_ptr + 3 * B + rows, c_s, mask=mask)
    tl.store(coef_ptr + 4 * B + rows, c_t, mask=mask)


@kernel(counts=("parts_s", "parts_t"))
def _gram_mse_coef_kernel(
    stats_ptr,  # [parts, G, 3, B] fp32: parts of the sums of A^2, K^2, A K
    coef_ptr,  # [G, 5, B] fp64
    loss_ptr,  # [G, B] fp32
    G,
    B,
    parts_s,  # of the first and the third; of the second there are parts_t
    parts_t,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(B, ROWS)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    rows = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mask = rows < B
    r2 = tl.zeros((ROWS,), tl.float64)
    q2 = tl.zeros((ROWS,), tl.float64)
    x = tl.zeros((ROWS,), tl.float64)
    ptrs = stats_ptr + g * 3 * B + rows
    step = tl.cast(G, tl.int64) * 3 * B
    for part in range(tl.maximum(parts_s, parts_t)):
        mask_s = mask & (part < parts_s)
        mask_t = mask & (part < parts_t)
        r2 += tl.load(ptrs, mask=mask_s, other=0.0).to(tl.float64)
        q2 += tl.load(ptrs + B, mask=mask_t, other=0.0).to(tl.float64)
        x += tl.load(ptrs + 2 * B, mask=mask_s, other=0.0).to(tl.float64)
        ptrs += step
    store_coefficients(coef_ptr + g * 5 * B, loss_ptr + g * B, rows, B, r2, q2, x, r2, q2, False)


@triton.jit
def store_uniform(coef_ptr, rows, B):
    """a = -2, b = 2, c = 0: no row is normalised."""
    for c in tl.static_range(5):
        value = -2.0 if c == 0 else (2.0 if c < 3 else 0.0)
        tl.store(coef_ptr + c * B + rows, tl.full(rows.shape, value, tl.float64), mask=rows < B)
