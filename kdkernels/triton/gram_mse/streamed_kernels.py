# SPDX-License-Identifier: Apache-2.0
"""Kernels of gram_mse "streamed"."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.gram_mse.product import accumulate, store_coefficients, store_uniform
from kdkernels.triton.gram_mse.tile import ROW, gram_weights, squared_error


@triton.jit
def _pair_of_tiles(
    s_ptr,
    t_ptr,
    scale_ptr,  # [2, stride_scale] fp32: 1 / |s_i|, 1 / |t_i|
    offs_m,
    offs_n,
    B,
    D_s,
    D_t,
    last_s,  # D_s, or 0 for a tile that is not wanted: it comes back as zeros
    last_t,
    stride_scale,
    stride_sb,
    stride_sd,
    stride_tb,
    stride_td,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    a = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), s_ptr, s_ptr, scale_ptr, offs_m, offs_n, B, B,
        D_s, 0, last_s, stride_sb, stride_sd, stride_sb, stride_sd, False, PRECISION, BLOCK_K,
    )  # fmt: skip
    k = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), t_ptr, t_ptr, scale_ptr, offs_m, offs_n, B, B,
        D_t, 0, last_t, stride_tb, stride_td, stride_tb, stride_td, False, PRECISION, BLOCK_K,
    )  # fmt: skip
    if SCALED:
        u_m = tl.load(scale_ptr + offs_m, mask=offs_m < B, other=0.0)
        u_n = tl.load(scale_ptr + offs_n, mask=offs_n < B, other=0.0)
        a *= u_m[:, None] * u_n[None, :]
        v_m = tl.load(scale_ptr + stride_scale + offs_m, mask=offs_m < B, other=0.0)
        v_n = tl.load(scale_ptr + stride_scale + offs_n, mask=offs_n < B, other=0.0)
        k *= v_m[:, None] * v_n[None, :]
    return a, k


@kernel(counts=("first_tile",))
def _gram_mse_fwd_kernel_streamed(
    s_ptr,  # [G, B, D_s]
    t_ptr,  # [G, B, D_t]
    scale_ptr,  # [2 or more, G, B] fp32: 1 / |s_i|, 1 / |t_i|
    # ROW: [G, n_blocks, STATS, m_blocks BLOCK] fp32 or fp64
    # else: [G, tiles] fp32, the sums of tiles, those of this chunk from first_tile on
    row_sums_ptr,
    column_sums_ptr,  # ROW: [G, m_blocks, STATS, n_blocks BLOCK] likewise
    coef_ptr,  # not ROW: [G, 5, B] fp64
    G,
    B,
    D_s,
    D_t,
    first_row,  # of the chunk; column blocks start there too
    m_blocks,
    n_blocks,
    first_tile,
    tiles,
    two_gamma,
    two_gamma_low,
    stride_sg,
    stride_sb,
    stride_sd,
    stride_tg,
    stride_tb,
    stride_td,
    FORM: tl.constexpr,
    L1: tl.constexpr,
    SCALED: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    i = pid % m_blocks
    j = (pid // m_blocks) % n_blocks
    g = (pid // m_blocks // n_blocks).to(tl.int64)
    local_m = i * BLOCK + tl.arange(0, BLOCK)
    local_n = j * BLOCK + tl.arange(0, BLOCK)
    wanted = j >= i
    a, k = _pair_of_tiles(
        s_ptr + g * stride_sg, t_ptr + g * stride_tg, scale_ptr + g * B, first_row + local_m,
        first_row + local_n, B, D_s, D_t, tl.where(wanted, D_s, 0), tl.where(wanted, D_t, 0),
        tl.cast(G, tl.int64) * B, stride_sb, stride_sd, stride_tb, stride_td, SCALED, PRECISION,
        BLOCK, BLOCK, BLOCK_K,
    )  # fmt: skip
    if FORM == ROW:
        STATS: tl.constexpr = 5 if L1 else 3
        # similar Grams cancel in r2 + q2 - 2 x, down to the rounding of these products, which
        # only fp32 features notice
        if s_ptr.dtype.element_ty == tl.float32:
            a = a.to(tl.float64)
            k = k.to(tl.float64)
        row_ptrs = row_sums_ptr + (g * n_blocks + j) * STATS * m_blocks * BLOCK + local_m
        column_ptrs = column_sums_ptr + (g * m_blocks + i) * STATS * n_blocks * BLOCK + local_n
        for stat in tl.static_range(STATS):
            if stat == 0:
                term = a * a
            elif stat == 1:
                term = k * k
            elif stat == 2:
                term = a * k
            elif stat == 3:
                term = tl.abs(a)
            else:
                term = tl.abs(k)
            tl.store(row_ptrs + stat * m_blocks * BLOCK, tl.sum(term, 1))
            # the rows of a tile on the diagonal are its columns
            tl.store(column_ptrs + stat * n_blocks * BLOCK, tl.where(j > i, tl.sum(term, 0), 0.0))
    else:
        # all at once: for sm_100 Triton 3.7.1 fails to compile one axis after the other
        total = tl.sum(squared_error(a, k, two_gamma, two_gamma_low, FORM, ORDER))
        tl.store(
            row_sums_ptr + g * tiles + first_tile + j * m_blocks + i,
            tl.where(j > i, 2.0 * total, total),
        )
        if i == j:
            store_uniform(coef_ptr + g * 5 * B, first_row + local_m, B)


@triton.jit
def _sum_blocks(
    row_ptrs,  # [ROWS] in [n_blocks, STATS, m_blocks BLOCK]
    column_ptrs,  # [ROWS] in [m_blocks, STATS, n_blocks BLOCK]
    row_step,
    column_step,
    n_blocks,  # 0 for rows beyond the chunk, which are only columns of it
    m_blocks,
    mask,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """[ROWS] fp64: what the tiles of a chunk left for some rows of one statistic."""
    offs = tl.arange(0, PARTS)
    total = tl.zeros((ROWS,), tl.float64)
    for j in range(0, n_blocks, PARTS):
        parts = (j + offs).to(tl.int64)[:, None]
        wanted = (parts < n_blocks) & mask[None, :]
        part = tl.load(row_ptrs[None, :] + parts * row_step, mask=wanted, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    for i in range(0, m_blocks, PARTS):
        parts = (i + offs).to(tl.int64)[:, None]
        wanted = (parts < m_blocks) & mask[None, :]
        part = tl.load(column_ptrs[None, :] + parts * column_step, mask=wanted, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    return total


@kernel(counts=("count",))
def _gram_mse_gather_kernel(
    row_sums_ptr,  # [G, n_blocks, STATS, m_blocks BLOCK] fp32 or fp64, as the sweep leaves them
    column_sums_ptr,  # [G, m_blocks, STATS, n_blocks BLOCK] likewise
    sums_ptr,  # [G, STATS, B] fp64: of this chunk and those before, for rows of later chunks
    coef_ptr,  # [G, 5, B] fp64
    loss_ptr,  # [G, B] fp32
    B,
    first_row,  # of the chunk
    count,  # rows of the chunk
    m_blocks,
    n_blocks,
    L1: tl.constexpr,
    BLOCK: tl.constexpr,  # of the sweep; a multiple of ROWS
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Adds what a chunk left. Later ones have no part in its rows, whose sums become loss and
    coefficients."""
    STATS: tl.constexpr = 5 if L1 else 3
    blocks = tl.cdiv(B - first_row, ROWS)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * ROWS
    local = start + tl.arange(0, ROWS)
    rows = first_row + local
    mask = rows < B
    own = start < count
    row_width = m_blocks * BLOCK
    column_width = n_blocks * BLOCK
    row_ptrs = row_sums_ptr + g * n_blocks * STATS * row_width + local
    column_ptrs = column_sums_ptr + g * m_blocks * STATS * column_width + local
    sums_ptrs = sums_ptr + g * STATS * B + rows
    from_rows = tl.where(own, n_blocks, 0)
    r2 = tl.zeros((ROWS,), tl.float64)
    q2 = tl.zeros((ROWS,), tl.float64)
    x = tl.zeros((ROWS,), tl.float64)
    l1_s = tl.zeros((ROWS,), tl.float64)
    l1_t = tl.zeros((ROWS,), tl.float64)
    for stat in tl.static_range(STATS):
        total = tl.load(sums_ptrs + stat * B, mask=mask & (first_row > 0), other=0.0)
        total += _sum_blocks(
            row_ptrs + stat * row_width, column_ptrs + stat * column_width, STATS * row_width,
            STATS * column_width, from_rows, m_blocks, mask, ROWS, PARTS,
        )  # fmt: skip
        if stat == 0:
            r2 = total
        elif stat == 1:
            q2 = total
        elif stat == 2:
            x = total
        elif stat == 3:
            l1_s = total
        else:
            l1_t = total
        if not own:
            tl.store(sums_ptrs + stat * B, total, mask=mask)
    if own:
        store_coefficients(
            coef_ptr + g * 5 * B, loss_ptr + g * B, rows, B, r2, q2, x, l1_s, l1_t, L1
        )


@kernel(lengths=("B",))
def _gram_mse_bwd_kernel_streamed(
    dout_ptr,  # [G], stride_dout apart
    s_ptr,  # [G, B, D_s]
    t_ptr,  # [G, B, D_t]
    scale_ptr,  # [2 or more, G, B] fp32: 1 / |s_i|, 1 / |t_i|
    coef_ptr,  # [G, 5, B] fp32 or fp64
    # weights of the student's gradient: C rows from first_row on, columns from there to B
    w_s_ptr,  # [G, C, N]
    w_t_ptr,  # [G, C, N] likewise, the teacher's
    G,
    B,
    D_s,
    D_t,
    C,
    first_row,
    two_gamma,
    two_gamma_low,
    slope_factor,
    stride_dout,
    stride_sg,
    stride_sb,
    stride_sd,
    stride_tg,
    stride_tb,
    stride_td,
    NEED_S: tl.constexpr,
    NEED_T: tl.constexpr,
    FORM: tl.constexpr,
    L1: tl.constexpr,
    SCALED: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N = B - first_row
    m_blocks = tl.cdiv(C, BLOCK_M)
    n_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    g = (pid // m_blocks // n_blocks).to(tl.int64)
    local_m = (pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    local_n = ((pid // m_blocks) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = first_row + local_m
    offs_n = first_row + local_n
    step = tl.cast(G, tl.int64) * B
    scale_ptr += g * B
    coef_ptr += g * 5 * B
    a, k = _pair_of_tiles(
        s_ptr + g * stride_sg, t_ptr + g * stride_tg, scale_ptr, offs_m, offs_n, B, D_s, D_t, D_s,
        D_t, step, stride_sb, stride_sd, stride_tb, stride_td, SCALED, PRECISION, BLOCK_M, BLOCK_N,
        BLOCK_K,
    )  # fmt: skip
    dout = tl.load(dout_ptr + g * stride_dout)
    mask = (local_m < C)[:, None] & (local_n < N)[None, :]
    offs = (g * C + local_m[:, None]) * N + local_n[None, :]
    # Divided by both norms: the same weights then serve rows and columns, and give the gradient of
    # x / |x|, divided by |x|.
    if NEED_S:
        w = (
            gram_weights(
                a,
                k,
                coef_ptr,
                offs_m,
                offs_n,
                B,
                two_gamma,
                two_gamma_low,
                slope_factor,
                0,
                FORM,
                L1,
                ORDER,
            )
            * dout
        )
        if SCALED:
            w *= tl.load(scale_ptr + offs_m, mask=offs_m < B, other=0.0)[:, None]
            w *= tl.load(scale_ptr + offs_n, mask=offs_n < B, other=0.0)[None, :]
        tl.store(w_s_ptr + offs, w.to(w_s_ptr.dtype.element_ty), mask=mask)
    if NEED_T:
        w = (
            gram_weights(
                k,
                a,
                coef_ptr,
                offs_m,
                offs_n,
                B,
                two_gamma,
                two_gamma_low,
                slope_factor,
                1,
                FORM,
                L1,
                ORDER,
            )
            * dout
        )
        if SCALED:
            w *= tl.load(scale_ptr + step + offs_m, mask=offs_m < B, other=0.0)[:, None]
            w *= tl.load(scale_ptr + step + offs_n, mask=offs_n < B, other=0.0)[None, :]
        tl.store(w_t_ptr + offs, w.to(w_t_ptr.dtype.element_ty), mask=mask)
