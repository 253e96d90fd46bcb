# SPDX-License-Identifier: Apache-2.0
"""gram_mse "factored": every B x B product is replaced by products with D x D factors.

C = S^T S, K = T^T T and M = T^T S come from the product kernel, contracted over rows. Forward: one
more sweep over the features, for r_i^2 = s_i C s_i, q_i^2 = t_i K t_i and x_i = t_i M s_i.
Backward: dS = b (S C) + S R + a (T M) + T P with P = T^T diag(a) S and R = S^T diag(b) S. Factors
are fp32, and products with them keep more than 8 or 11 bits of theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.dots import dot_split
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import cdiv
from kdkernels.triton.common.norms import normalise_gradient
from kdkernels.triton.gram_mse.call import Call, add_splits, coefficients, products, uniform_coef


@triton.jit
def _features_by_factor(
    acc,
    x_ptr,  # [B, K]
    f_ptr,  # [K, N] fp32
    offs_m,
    offs_n,
    B,
    K,
    N,
    stride_xb,
    stride_xk,
    stride_fk,
    stride_fn,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xb
    f_ptrs = f_ptr + offs_n.to(tl.int64)[None, :] * stride_fn
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptrs + offs_k.to(tl.int64)[None, :] * stride_xk,
            mask=(offs_m < B)[:, None] & mask_k[None, :],
            other=0.0,
        )
        f = tl.load(
            f_ptrs + offs_k.to(tl.int64)[:, None] * stride_fk,
            mask=mask_k[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )
        acc = dot_split(x, f, acc, PRECISION)
    return acc


@kernel
def _gram_mse_fwd_kernel_factored(
    s_ptr,  # [G, B, D_s]
    t_ptr,  # [G, B, D_t]
    c_ptr,  # [G, D_s, D_s] fp32: C
    k_ptr,  # [G, D_t, D_t] fp32: K
    m_ptr,  # [G, D_t, D_s] fp32: M
    stats_ptr,  # [parts, G, 3, B] fp32, zeros: a part of r^2, q^2, x per block of features
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
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m_blocks = tl.cdiv(B, BLOCK_M)
    n_s = tl.cdiv(D_s, BLOCK_N)
    n_t = tl.cdiv(D_t, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = (pid // m_blocks) % (n_s + n_t)
    g = (pid // m_blocks // (n_s + n_t)).to(tl.int64)
    s_ptr += g * stride_sg
    t_ptr += g * stride_tg
    rows = offs_m.to(tl.int64)
    mask_m = offs_m < B
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if part < n_s:
        offs_n = part * BLOCK_N + tl.arange(0, BLOCK_N)
        s = tl.load(
            s_ptr + rows[:, None] * stride_sb + offs_n.to(tl.int64)[None, :] * stride_sd,
            mask=mask_m[:, None] & (offs_n < D_s)[None, :],
            other=0.0,
        ).to(tl.float32)
        out = stats_ptr + (part.to(tl.int64) * G + g) * 3 * B + rows
        y = _features_by_factor(
            zeros,
            s_ptr,
            c_ptr + g * D_s * D_s,
            offs_m,
            offs_n,
            B,
            D_s,
            D_s,
            stride_sb,
            stride_sd,
            D_s,
            1,
            PRECISION,
            BLOCK_K,
        )
        tl.store(out, tl.sum(y * s, 1), mask=mask_m)
        y = _features_by_factor(
            zeros,
            t_ptr,
            m_ptr + g * D_t * D_s,
            offs_m,
            offs_n,
            B,
            D_t,
            D_s,
            stride_tb,
            stride_td,
            D_s,
            1,
            PRECISION,
            BLOCK_K,
        )
        tl.store(out + 2 * B, tl.sum(y * s, 1), mask=mask_m)
    else:
        offs_n = (part - n_s) * BLOCK_N + tl.arange(0, BLOCK_N)
        t = tl.load(
            t_ptr + rows[:, None] * stride_tb + offs_n.to(tl.int64)[None, :] * stride_td,
            mask=mask_m[:, None] & (offs_n < D_t)[None, :],
            other=0.0,
        ).to(tl.float32)
        y = _features_by_factor(
            zeros,
            t_ptr,
            k_ptr + g * D_t * D_t,
            offs_m,
            offs_n,
            B,
            D_t,
            D_t,
            stride_tb,
            stride_td,
            D_t,
            1,
            PRECISION,
            BLOCK_K,
        )
        out = stats_ptr + ((part - n_s).to(tl.int64) * G + g) * 3 * B + rows
        tl.store(out + B, tl.sum(y * t, 1), mask=mask_m)


@kernel
def _gram_mse_bwd_kernel_factored(
    dout_ptr,  # [G], stride_dout apart
    x_ptr,  # [G, B, D_x] features of the side that is differentiated
    y_ptr,  # [G, B, D_y] features of the other side
    gram_ptr,  # [G, D_x, D_x] fp32: X^T X
    cross_ptr,  # [G, D_y, D_x] fp32, strides stride_k and stride_n: Y^T X
    row_factor_ptr,  # [G, D_x, D_x] fp32: X^T diag(b) X; not for UNIFORM
    cross_row_ptr,  # [G, D_y, D_x] fp32, strides likewise: Y^T diag(a) X; not for UNIFORM
    a_ptr,  # [G, B] fp32 or fp64, groups stride_coef apart; not for UNIFORM
    b_ptr,  # [G, B] likewise
    scale_x_ptr,  # [G, B] fp32: 1 / |x_i|; for SCALED
    scale_y_ptr,  # [G, B] fp32: 1 / |y_i|
    dx_ptr,  # [G, B, D_x]; if SCALED fp32, the gradient of x / |x|, divided by |x|
    B,
    D_x,
    D_y,
    stride_dout,
    stride_coef,
    stride_xg,
    stride_xb,
    stride_xd,
    stride_yg,
    stride_yb,
    stride_yd,
    stride_k,
    stride_n,
    UNIFORM: tl.constexpr,  # a = -2, b = 2 for all rows
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m_blocks = tl.cdiv(B, BLOCK_M)
    n_blocks = tl.cdiv(D_x, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = ((pid // m_blocks) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = (pid // m_blocks // n_blocks).to(tl.int64)
    mask_m = offs_m < B
    x_ptr += g * stride_xg
    y_ptr += g * stride_yg
    factor_offs = g * D_x * D_x
    cross_offs = g * D_x * D_y
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _features_by_factor(
        acc,
        x_ptr,
        gram_ptr + factor_offs,
        offs_m,
        offs_n,
        B,
        D_x,
        D_x,
        stride_xb,
        stride_xd,
        D_x,
        1,
        PRECISION,
        BLOCK_K,
    )
    other = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    other = _features_by_factor(
        other, y_ptr, cross_ptr + cross_offs, offs_m, offs_n, B, D_y, D_x, stride_yb, stride_yd,
        stride_k, stride_n, PRECISION, BLOCK_K,
    )  # fmt: skip
    dout = tl.load(dout_ptr + g * stride_dout)
    if UNIFORM:
        if SCALED:
            u = tl.load(scale_x_ptr + g * B + offs_m, mask=mask_m, other=0.0)[:, None]
            v = tl.load(scale_y_ptr + g * B + offs_m, mask=mask_m, other=0.0)[:, None]
            acc = (acc * u - other * v) * u
        else:
            acc -= other
        acc *= 4.0 * dout
    else:
        a = tl.load(a_ptr + g * stride_coef + offs_m, mask=mask_m, other=0.0)[:, None]
        b = tl.load(b_ptr + g * stride_coef + offs_m, mask=mask_m, other=0.0)[:, None]
        acc = acc * b.to(tl.float32) + other * a.to(tl.float32)
        acc = _features_by_factor(
            acc,
            x_ptr,
            row_factor_ptr + factor_offs,
            offs_m,
            offs_n,
            B,
            D_x,
            D_x,
            stride_xb,
            stride_xd,
            D_x,
            1,
            PRECISION,
            BLOCK_K,
        )
        acc = _features_by_factor(
            acc, y_ptr, cross_row_ptr + cross_offs, offs_m, offs_n, B, D_y, D_x, stride_yb,
            stride_yd, stride_k, stride_n, PRECISION, BLOCK_K,
        )  # fmt: skip
        acc *= dout
    dx_ptrs = dx_ptr + (g * B + offs_m[:, None]) * D_x + offs_n[None, :]
    tl.store(
        dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < D_x)[None, :]
    )


def forward(call: Call) -> tuple[Tensor, ...]:
    G, B, D_s, D_t = call.sizes
    tile, precision = call.config.row, call.config.precision.factors
    weights = dict(zip(("ss", "tt", "ts"), call.scales()[2:], strict=True)) if call.scaled else None
    parts = products(call, call.student.mT, call.teacher.mT, "ss tt ts", precision, weights)
    full = add_splits(call, parts)
    factors = full["ss"], full["tt"], full["ts"]
    if not call.rows_normalised:
        square_s, square_t, cross = (
            torch.linalg.vector_norm(f, dim=(1, 2), dtype=torch.float64).square() for f in factors
        )
        return (square_s + square_t - 2 * cross).clamp_min(0).float(), uniform_coef(call), *factors
    n_s, n_t = cdiv(D_s, tile.n), cdiv(D_t, tile.n)
    stats = torch.zeros((max(n_s, n_t), G, 3, B), dtype=torch.float32, device=call.student.device)
    _gram_mse_fwd_kernel_factored[(G * cdiv(B, tile.m) * (n_s + n_t),)](
        s_ptr=call.student, t_ptr=call.teacher, c_ptr=factors[0], k_ptr=factors[1],
        m_ptr=factors[2], stats_ptr=stats, G=G, B=B, D_s=D_s, D_t=D_t, **call.strides,
        PRECISION=precision, **tile.launch(),
    )  # fmt: skip
    return *coefficients(call, stats), *factors


def gradient(
    call: Call,
    side: int,  # 0: student, 1: teacher
    dout: Tensor,  # [G]
    coef: Tensor,
    gram: Tensor,  # [G, D_x, D_x]
    cross: Tensor,  # [G, D_t, D_s]
    row_factors: tuple[
        Tensor, Tensor
    ],  # X^T diag(b) X, T^T diag(a) S; anything if rows are not normalised
    scales: Tensor,
) -> Tensor:
    x, y = (call.student, call.teacher) if side == 0 else (call.teacher, call.student)
    G, B, D_x = x.shape
    D_y, tile = y.shape[2], call.config.factored
    dx = call.new(G, B, D_x, dtype=torch.float32 if call.scaled else x.dtype)
    stride_k, stride_n = (
        (cross.stride(1), cross.stride(2)) if side == 0 else (cross.stride(2), cross.stride(1))
    )
    _gram_mse_bwd_kernel_factored[(G * tile.count(B, D_x),)](
        dout_ptr=dout, x_ptr=x, y_ptr=y, gram_ptr=gram, cross_ptr=cross,
        row_factor_ptr=row_factors[0], cross_row_ptr=row_factors[1], a_ptr=coef,
        b_ptr=coef[:, 1 + side], scale_x_ptr=scales[side] if call.scaled else coef,
        scale_y_ptr=scales[1 - side] if call.scaled else coef, dx_ptr=dx, B=B, D_x=D_x, D_y=D_y,
        stride_dout=dout.stride(0), stride_coef=coef.stride(0), stride_xg=x.stride(0),
        stride_xb=x.stride(1), stride_xd=x.stride(2), stride_yg=y.stride(0), stride_yb=y.stride(1),
        stride_yd=y.stride(2), stride_k=stride_k, stride_n=stride_n,
        UNIFORM=not call.rows_normalised, SCALED=call.scaled,
        PRECISION=call.config.precision.factors, **tile.launch(),
    )  # fmt: skip
    return normalise_gradient(x, dx) if call.scaled else dx


def row_factors(call: Call, coef: Tensor, need: tuple[bool, bool]) -> dict[str, Tensor]:
    """S^T diag(b_s) S ("ss"), T^T diag(b_t) T ("tt"), T^T diag(a) S ("ts"): as `need` asks."""
    wanted = " ".join(
        name for name, needed in (("ss", need[0]), ("tt", need[1]), ("ts", True)) if needed
    )
    weights = {"ss": coef[:, 1], "tt": coef[:, 2], "ts": coef[:, 0]}
    parts = products(
        call, call.student.mT, call.teacher.mT, wanted, call.config.precision.factors, weights
    )
    return add_splits(call, parts)
