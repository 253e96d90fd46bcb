# SPDX-License-Identifier: Apache-2.0
"""gram_mse "resident": both B x B Grams are kept, for B no larger than the features are wide.

Forward: split-K partial Grams, then one program per few rows that adds the splits, finishes its
rows of both Grams and reduces them to loss and coefficients. Features are read once per tile row
and column. Backward: weights are made from the two Grams tile by tile and go straight into the
product with the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.dots import dot_weights
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import COLUMNS, ROWS, cdiv
from kdkernels.triton.common.norms import normalise_gradient
from kdkernels.triton.common.prepared import REMEMBERED, Launch
from kdkernels.triton.gram_mse.call import Call, Curve, new, products
from kdkernels.triton.gram_mse.product import mirrored, store_coefficients, store_uniform
from kdkernels.triton.gram_mse.tile import ROW, gram_weights, squared_error


@triton.jit
def _sum_parts(parts_ptr, source, G, B, splits, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for split in range(splits):
        part = tl.cast(split, tl.int64) * G * B * B
        total += tl.load(parts_ptr + part + source, mask=mask, other=0.0)
    return total


@kernel(lengths=("B",))
def _gram_mse_fwd_kernel_resident(
    ss_parts_ptr,  # [splits, G, B, B] fp32, tiles on or above the diagonal
    tt_parts_ptr,  # [splits, G, B, B]
    scale_ptr,  # [2 or more, G, B] fp32: 1 / |s_i|, 1 / |t_i|
    # full; may be the parts if there is one split, of which only the upper tiles are read
    gram_s_ptr,  # [G, B, B] fp32
    gram_t_ptr,  # [G, B, B]
    coef_ptr,  # [G, 5, B] fp64
    loss_ptr,  # [G, B] fp32, per row
    G,
    B,
    splits,
    two_gamma,
    two_gamma_low,
    loss_factor,
    FORM: tl.constexpr,
    L1: tl.constexpr,
    SCALED: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,  # of the product
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(B, ROWS)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    base = g * B * B
    step = tl.cast(G, tl.int64) * B
    scale_ptr += g * B
    if SCALED:
        u = tl.load(scale_ptr + rows, mask=rows < B, other=0.0)
        v = tl.load(scale_ptr + step + rows, mask=rows < B, other=0.0)
    # fp64: similar Grams cancel in r2 + q2 - 2 x, down to the rounding of the products
    r2 = tl.zeros((ROWS,), tl.float64)
    q2 = tl.zeros((ROWS,), tl.float64)
    x = tl.zeros((ROWS,), tl.float64)
    l1_s = tl.zeros((ROWS,), tl.float64)
    l1_t = tl.zeros((ROWS,), tl.float64)
    for n in range(0, B, COLUMNS):
        columns = n + tl.arange(0, COLUMNS)
        mask = (rows < B)[:, None] & (columns < B)[None, :]
        source = base + mirrored(rows[:, None], columns[None, :], B, BLOCK)
        a = _sum_parts(ss_parts_ptr, source, G, B, splits, mask, ROWS, COLUMNS)
        k = _sum_parts(tt_parts_ptr, source, G, B, splits, mask, ROWS, COLUMNS)
        if SCALED:
            a *= u[:, None] * tl.load(scale_ptr + columns, mask=columns < B, other=0.0)[None, :]
            k *= (
                v[:, None]
                * tl.load(scale_ptr + step + columns, mask=columns < B, other=0.0)[None, :]
            )
        offs = base + rows.to(tl.int64)[:, None] * B + columns[None, :]
        tl.store(gram_s_ptr + offs, a, mask=mask)
        tl.store(gram_t_ptr + offs, k, mask=mask)
        if FORM == ROW:
            wide_a = a.to(tl.float64)
            wide_k = k.to(tl.float64)
            r2 += tl.sum(wide_a * wide_a, 1)
            q2 += tl.sum(wide_k * wide_k, 1)
            x += tl.sum(wide_a * wide_k, 1)
            if L1:
                l1_s += tl.sum(tl.abs(wide_a), 1)
                l1_t += tl.sum(tl.abs(wide_k), 1)
        else:
            r2 += tl.sum(squared_error(a, k, two_gamma, two_gamma_low, FORM, ORDER), 1).to(
                tl.float64
            )
    coef_ptr += g * 5 * B
    loss_ptr += g * B
    if FORM == ROW:
        store_coefficients(coef_ptr, loss_ptr, rows, B, r2, q2, x, l1_s, l1_t, L1)
    else:
        tl.store(loss_ptr + rows, (r2 * loss_factor).to(tl.float32), mask=rows < B)
        store_uniform(coef_ptr, rows, B)


@kernel(lengths=("B",))
def _gram_mse_bwd_kernel_resident(
    dout_ptr,  # [G], stride_dout apart
    x_ptr,  # [G, B, D] features of the side that is differentiated
    gram_ptr,  # [G, B, B] fp32, its Gram
    other_ptr,  # [G, B, B] fp32
    coef_ptr,  # [G, 5, B] fp32 or fp64
    scale_ptr,  # [G, B] fp32: 1 / |x_i|
    dx_ptr,  # [G, B, D]; if SCALED fp32, the gradient of x / |x|, divided by |x|
    B,
    D,
    two_gamma,
    two_gamma_low,
    slope_factor,
    stride_dout,
    stride_g,
    stride_b,
    stride_d,
    SIDE: tl.constexpr,
    FORM: tl.constexpr,
    L1: tl.constexpr,
    SCALED: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # row blocks vary fastest, so that programs that share columns of the features run together
    m_blocks = tl.cdiv(B, BLOCK_M)
    n_blocks = tl.cdiv(D, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = ((pid // m_blocks) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = (pid // m_blocks // n_blocks).to(tl.int64)
    mask_m = offs_m < B
    mask_d = offs_d < D
    dout = tl.load(dout_ptr + g * stride_dout)
    coef_ptr += g * 5 * B
    scale_ptr += g * B
    x_ptrs = x_ptr + g * stride_g + offs_d.to(tl.int64)[None, :] * stride_d
    gram_offs = g * B * B + offs_m.to(tl.int64)[:, None] * B
    if SCALED:
        row_scale = tl.load(scale_ptr + offs_m, mask=mask_m, other=0.0) * dout
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, B, BLOCK_K):
        offs_j = j + tl.arange(0, BLOCK_K)
        mask_j = offs_j < B
        mask = mask_m[:, None] & mask_j[None, :]
        gram = tl.load(gram_ptr + gram_offs + offs_j[None, :], mask=mask, other=0.0)
        other = tl.load(other_ptr + gram_offs + offs_j[None, :], mask=mask, other=0.0)
        w = gram_weights(
            gram,
            other,
            coef_ptr,
            offs_m,
            offs_j,
            B,
            two_gamma,
            two_gamma_low,
            slope_factor,
            SIDE,
            FORM,
            L1,
            ORDER,
        )
        if SCALED:
            w *= row_scale[:, None] * tl.load(scale_ptr + offs_j, mask=mask_j, other=0.0)[None, :]
        else:
            w *= dout
        x = tl.load(
            x_ptrs + offs_j.to(tl.int64)[:, None] * stride_b,
            mask=mask_j[:, None] & mask_d[None, :],
            other=0.0,
        )
        acc = dot_weights(w, x, acc, PRECISION)
    dx_ptrs = dx_ptr + (g * B + offs_m[:, None]) * D + offs_d[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])


@dataclass(frozen=True)
class _Forward:
    finish: Launch
    split: bool  # whether the product leaves parts to be added


@lru_cache(REMEMBERED)
def _forward(call: Call) -> _Forward:
    G, B = call.sizes[:2]
    splits = call.config.splits
    finish = Launch(
        _gram_mse_fwd_kernel_resident, (G * cdiv(B, ROWS),), G=G, B=B, splits=splits,
        **call.epilogue, BLOCK=call.config.product.m, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return _Forward(finish, splits > 1)


def forward(
    call: Call,
    student: Tensor,  # [G, B, D_s]
    teacher: Tensor,  # [G, B, D_t]
    curve: Curve,
) -> tuple[Tensor, ...]:
    G, B = call.sizes[:2]
    plan = _forward(call)
    parts = products(call, student, teacher, "ss tt")
    gram_s, gram_t = (
        new(student, G, B, B) if plan.split else part[0] for part in (parts["ss"], parts["tt"])
    )
    coef, loss = new(student, G, 5, B, dtype=torch.float64), new(student, G, B)
    plan.finish(
        ss_parts_ptr=parts["ss"], tt_parts_ptr=parts["tt"],
        scale_ptr=call.scales(student, teacher), gram_s_ptr=gram_s, gram_t_ptr=gram_t,
        coef_ptr=coef, loss_ptr=loss, loss_factor=curve.loss_factor, **curve.exponent,
    )  # fmt: skip
    return loss.sum(1), coef, gram_s, gram_t, new(student, G, 0, 0)


@lru_cache(REMEMBERED)
def _gradient(call: Call, side: int, stride_dout: int) -> Launch:
    G, B, D_s, D_t = call.sizes
    tile, D = call.config.weighted, (D_s, D_t)[side]
    stride_g, stride_b, stride_d = (call.student_strides, call.teacher_strides)[side]
    return Launch(
        _gram_mse_bwd_kernel_resident, (G * tile.count(B, D),), B=B, D=D, stride_dout=stride_dout,
        stride_g=stride_g, stride_b=stride_b, stride_d=stride_d, SIDE=side, **call.epilogue,
        PRECISION=call.config.precision.weights, **tile.launch(),
    )  # fmt: skip


def gradients(
    call: Call,
    features: tuple[Tensor, Tensor],  # [G, B, D_s], [G, B, D_t]
    dout: Tensor,  # [G]
    coef: Tensor,
    grams: list[Tensor],  # [G, B, B], [G, B, B]
    need: tuple[bool, bool],
    curve: Curve,
) -> dict[int, Tensor]:  # of the sides that are needed: 0 for the student, 1 for the teacher
    scales = call.scales(*features)
    grads = {}
    for side in range(2):
        if not need[side]:
            continue
        x = features[side]
        dx = new(x, *x.shape, dtype=torch.float32 if call.scaled else x.dtype)
        _gradient(call, side, dout.stride(0))(
            dout_ptr=dout, x_ptr=x, gram_ptr=grams[side], other_ptr=grams[1 - side], coef_ptr=coef,
            scale_ptr=scales[side] if call.scaled else x, dx_ptr=dx,
            slope_factor=curve.slope_factor, **curve.exponent,
        )  # fmt: skip
        grads[side] = normalise_gradient(x, dx) if call.scaled else dx
    return grads
