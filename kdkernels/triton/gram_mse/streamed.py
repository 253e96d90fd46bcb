# SPDX-License-Identifier: Apache-2.0
"""gram_mse "streamed": tiles of both Grams are made, used and dropped, for B beyond the width of
the features.

Rows are taken in chunks; of the tiles of a chunk only those on or above the diagonal of the whole
matrix are computed, and each serves its rows and its columns. Forward: features are read once per
tile row and column, and a tile leaves a few sums per row and column. Backward: a chunk of weights
is written, then multiplied with the features both ways.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import cdiv
from kdkernels.triton.common.norms import normalise_gradient
from kdkernels.triton.common.product import multiply_groups
from kdkernels.triton.gram_mse.call import Call, coefficients, uniform_coef
from kdkernels.triton.gram_mse.product import accumulate
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


@kernel
def _gram_mse_fwd_kernel_streamed(
    s_ptr,  # [G, B, D_s]
    t_ptr,  # [G, B, D_t]
    scale_ptr,  # [2 or more, G, B] fp32: 1 / |s_i|, 1 / |t_i|
    # ROW: [G, n_blocks, STATS, m_blocks BLOCK] fp32 or fp64
    # else: [G, n_blocks, m_blocks] fp32, the sum of the tile
    row_sums_ptr,
    column_sums_ptr,  # ROW: [G, m_blocks, STATS, n_blocks BLOCK] likewise
    G,
    B,
    D_s,
    D_t,
    first_row,  # of the chunk; column blocks start there too
    m_blocks,
    n_blocks,
    two_gamma,
    two_gamma_low,
    slope_factor,
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
        total = tl.sum(tl.sum(squared_error(a, k, two_gamma, two_gamma_low, FORM, ORDER), 1), 0)
        tl.store(
            row_sums_ptr + (g * n_blocks + j) * m_blocks + i, tl.where(j > i, 2.0 * total, total)
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


def forward(call: Call) -> tuple[Tensor, ...]:
    G, B, D_s, D_t = call.sizes
    tile, chunk, scales = call.config.pair, call.config.chunk, call.scales()
    stats_per_row = 5 if call.normalize == "row_l1" else 3
    # added up chunk by chunk, in fp64: A^2, K^2, A K, |A|, |K| per row, or the loss
    shape = (G, stats_per_row, B) if call.rows_normalised else (G,)
    sum_dtype = (
        torch.float64 if call.student.dtype == torch.float32 else torch.float32
    )  # as the kernel forms the terms
    sums = torch.zeros(shape, dtype=torch.float64, device=call.student.device)
    for first in range(0, B, chunk):
        m_blocks, n_blocks = cdiv(min(chunk, B - first), tile.m), cdiv(B - first, tile.m)
        if call.rows_normalised:
            row_sums = call.new(G, n_blocks, stats_per_row, m_blocks * tile.m, dtype=sum_dtype)
            column_sums = call.new(G, m_blocks, stats_per_row, n_blocks * tile.m, dtype=sum_dtype)
        else:
            row_sums = column_sums = call.new(G, n_blocks * m_blocks)
        _gram_mse_fwd_kernel_streamed[(G * m_blocks * n_blocks,)](
            s_ptr=call.student, t_ptr=call.teacher, scale_ptr=scales, row_sums_ptr=row_sums,
            column_sums_ptr=column_sums, G=G, B=B, D_s=D_s, D_t=D_t, first_row=first,
            m_blocks=m_blocks, n_blocks=n_blocks, **call.strides, **call.epilogue,
            PRECISION=call.config.precision.features, **tile.launch_square(),
        )  # fmt: skip
        if call.rows_normalised:
            last = min(first + chunk, B)
            sums[:, :, first:last] += row_sums.sum(1, dtype=torch.float64)[:, :, : last - first]
            sums[:, :, first:] += column_sums.sum(1, dtype=torch.float64)[:, :, : B - first]
        else:
            sums += row_sums.sum(1, dtype=torch.float64)
    if call.rows_normalised:
        loss, coef = coefficients(call, sums[None])
    else:
        loss, coef = call.scale_loss(sums).float(), uniform_coef(call)
    nothing = call.new(G, 0, 0)
    return loss, coef, nothing, torch.empty_like(nothing), torch.empty_like(nothing)


def gradients(
    call: Call,
    dout: Tensor,  # [G]
    coef: Tensor,
    need: tuple[bool, bool],  # student, teacher
) -> list[Tensor | None]:
    G, B, D_s, D_t = call.sizes
    tile, chunk, scales = call.config.pair_weights, call.config.chunk, call.scales()
    sides = [side for side in range(2) if need[side]]
    features = (call.student, call.teacher)
    sums = {
        side: torch.zeros(features[side].shape, dtype=torch.float32, device=coef.device)
        for side in sides
    }
    weight_dtype = torch.bfloat16 if call.student.dtype == torch.bfloat16 else torch.float32
    product = call.config.weighted, call.config.precision.weights
    for first in range(0, B, chunk):
        C, N = min(chunk, B - first), B - first
        weights = {side: call.new(G, C, N, dtype=weight_dtype) for side in sides}
        some = weights[sides[0]]
        _gram_mse_bwd_kernel_streamed[(G * tile.count(C, N),)](
            dout_ptr=dout, s_ptr=call.student, t_ptr=call.teacher, scale_ptr=scales, coef_ptr=coef,
            w_s_ptr=weights.get(0, some), w_t_ptr=weights.get(1, some), G=G, B=B, D_s=D_s, D_t=D_t,
            C=C, first_row=first, stride_dout=dout.stride(0), **call.strides, NEED_S=need[0],
            NEED_T=need[1], **call.epilogue, PRECISION=call.config.precision.features,
            **tile.launch(),
        )  # fmt: skip
        for side in sides:
            w, x, out = weights[side], features[side][:, first:], sums[side][:, first:]
            parts = call.new(call.config.weighted_splits, G, C, x.shape[2])
            multiply_groups(*product, w, x, parts, add=False)
            out[:, :C] += parts.sum(0)
            if N > C:
                multiply_groups(*product, w[:, :, C:].mT, x[:, :C], out[None, :, C:], add=True)
    grads: list[Tensor | None] = [None, None]
    for side in sides:
        x = features[side]
        grads[side] = normalise_gradient(x, sums[side]) if call.scaled else sums[side].to(x.dtype)
    return grads
