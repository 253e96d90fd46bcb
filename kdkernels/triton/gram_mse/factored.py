# SPDX-License-Identifier: Apache-2.0
"""gram_mse "factored": every B x B product is replaced by products with D x D factors.

C = S^T S, K = T^T T and M = T^T S come from the product kernel, contracted over rows. Forward: one
more sweep over the features, for r_i^2 = s_i C s_i, q_i^2 = t_i K t_i and x_i = t_i M s_i.
Backward: dS = b (S C) + S R + a (T M) + T P with P = T^T diag(a) S and R = S^T diag(b) S. Factors
are fp32, and products with them keep more than 8 or 11 bits of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.dots import dot_split
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import COLUMNS, cdiv
from kdkernels.triton.common.norms import normalise_gradient
from kdkernels.triton.common.prepared import REMEMBERED, Launch
from kdkernels.triton.gram_mse.call import Call, Curve, add_splits, new, products
from kdkernels.triton.gram_mse.product import _gram_mse_coef_kernel


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
    # [parts, G, 3, B] fp32: a part of r^2, q^2, x per block of features
    stats_ptr,
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


@dataclass(frozen=True)
class _Rows:
    """One more sweep over the features, and what follows it."""

    sweep: Launch
    coefficients: Launch
    parts: int


@lru_cache(REMEMBERED)
def _rows(call: Call) -> _Rows:
    G, B, D_s, D_t = call.sizes
    tile = call.config.row
    n_s, n_t = cdiv(D_s, tile.n), cdiv(D_t, tile.n)
    sweep = Launch(
        _gram_mse_fwd_kernel_factored, (G * cdiv(B, tile.m) * (n_s + n_t),), G=G, B=B, D_s=D_s,
        D_t=D_t, **call.strides, PRECISION=call.config.precision.factors, **tile.launch(),
    )  # fmt: skip
    coefficients = Launch(
        _gram_mse_coef_kernel, (G * cdiv(B, COLUMNS),), G=G, B=B, parts_s=n_s, parts_t=n_t,
        ROWS=COLUMNS, num_warps=2,
    )  # fmt: skip
    return _Rows(sweep, coefficients, max(n_s, n_t))


def forward(
    call: Call,
    student: Tensor,  # [G, B, D_s]
    teacher: Tensor,  # [G, B, D_t]
    _: Curve,
) -> tuple[Tensor, ...]:
    G, B = call.sizes[:2]
    scales = call.scales(student, teacher)
    weights = dict(zip(("ss", "tt", "ts"), scales[2:], strict=True)) if call.scaled else None
    parts = products(call, student, teacher, "ss tt ts", factors=True, weights=weights)
    full = add_splits(call, parts)
    factors = full["ss"], full["tt"], full["ts"]
    if not call.rows_normalised:
        square_s, square_t, cross = (
            torch.linalg.vector_norm(f, dim=(1, 2), dtype=torch.float64).square() for f in factors
        )
        loss = (square_s + square_t - 2 * cross).clamp_min(0).float()
        return loss, uniform_coef(student, G, B), *factors
    rows = _rows(call)
    stats = new(student, rows.parts, G, 3, B)
    rows.sweep(
        s_ptr=student, t_ptr=teacher, c_ptr=factors[0], k_ptr=factors[1], m_ptr=factors[2],
        stats_ptr=stats,
    )  # fmt: skip
    coef, loss = new(student, G, 5, B, dtype=torch.float64), new(student, G, B)
    rows.coefficients(stats_ptr=stats, coef_ptr=coef, loss_ptr=loss)
    return loss.sum(1), coef, *factors


def uniform_coef(student: Tensor, G: int, B: int) -> Tensor:
    """a = -2, b = 2, c = 0: no row is normalised."""
    coef = student.new_zeros((G, 5, B), dtype=torch.float64)
    coef[:, 0].fill_(-2.0)
    coef[:, 1:3].fill_(2.0)
    return coef


@lru_cache(REMEMBERED)
def _gradient(call: Call, side: int, stride_dout: int) -> Launch:
    G, B, D_s, D_t = call.sizes
    D_x, D_y = (D_s, D_t) if side == 0 else (D_t, D_s)
    x, y = call.student_strides, call.teacher_strides
    if side == 1:
        x, y = y, x
    tile = call.config.factored
    stride_k, stride_n = (D_s, 1) if side == 0 else (1, D_s)  # of T^T S and its transpose
    return Launch(
        _gram_mse_bwd_kernel_factored, (G * tile.count(B, D_x),), B=B, D_x=D_x, D_y=D_y,
        stride_dout=stride_dout, stride_coef=5 * B, stride_xg=x[0], stride_xb=x[1], stride_xd=x[2],
        stride_yg=y[0], stride_yb=y[1], stride_yd=y[2], stride_k=stride_k, stride_n=stride_n,
        UNIFORM=not call.rows_normalised, SCALED=call.scaled,
        PRECISION=call.config.precision.factors, **tile.launch(),
    )  # fmt: skip


def gradients(
    call: Call,
    features: tuple[Tensor, Tensor],  # [G, B, D_s], [G, B, D_t]
    dout: Tensor,  # [G]
    coef: Tensor,
    factors: list[Tensor],  # [G, D_s, D_s], [G, D_t, D_t], [G, D_t, D_s], contiguous
    need: tuple[bool, bool],
) -> dict[int, Tensor]:  # of the sides that are needed: 0 for the student, 1 for the teacher
    *grams, cross = factors
    scales = call.scales(*features)
    rows = _row_factors(call, features, coef, need) if call.rows_normalised else {}
    grads = {}
    for side in range(2):
        if not need[side]:
            continue
        x, y = features[side], features[1 - side]
        dx = new(x, *x.shape, dtype=torch.float32 if call.scaled else x.dtype)
        _gradient(call, side, dout.stride(0))(
            dout_ptr=dout, x_ptr=x, y_ptr=y, gram_ptr=grams[side], cross_ptr=cross,
            row_factor_ptr=rows.get(("ss", "tt")[side], coef), cross_row_ptr=rows.get("ts", coef),
            a_ptr=coef, b_ptr=coef[:, 1 + side], scale_x_ptr=scales[side] if call.scaled else coef,
            scale_y_ptr=scales[1 - side] if call.scaled else coef, dx_ptr=dx,
        )  # fmt: skip
        grads[side] = normalise_gradient(x, dx) if call.scaled else dx
    return grads


def _row_factors(
    call: Call, features: tuple[Tensor, Tensor], coef: Tensor, need: tuple[bool, bool]
) -> dict[str, Tensor]:
    """S^T diag(b_s) S ("ss"), T^T diag(b_t) T ("tt"), T^T diag(a) S ("ts"): as `need` asks."""
    wanted = " ".join(
        name for name, needed in (("ss", need[0]), ("tt", need[1]), ("ts", True)) if needed
    )
    weights = {"ss": coef[:, 1], "tt": coef[:, 2], "ts": coef[:, 0]}
    return add_splits(call, products(call, *features, wanted, factors=True, weights=weights))
