# SPDX-License-Identifier: Apache-2.0
"""Kernels of relational_kl that go over rows without a product: the scales of rows and keys before
the sweeps, and the gradients through these scales after them.

Inner products are fp64: a scale is rounded once, and what a gradient has along its row, which is
taken away, can far exceed what remains.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.norms import EPS

# Places of `RowNumbers`, of B numbers each.
LSE_S = tl.constexpr(0)
LSE_T = tl.constexpr(1)
SCALE_S = tl.constexpr(2)
SCALE_T = tl.constexpr(3)
SCALE_OWN = tl.constexpr(4)
OWN_S = tl.constexpr(5)
OWN_T = tl.constexpr(6)

# Whose gradient a program makes.
_STUDENT = tl.constexpr(0)
_TEACHER = tl.constexpr(1)
_OWN = tl.constexpr(2)

_LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32


@triton.jit
def _tile(x_ptr, rows, mask, d, D, COLUMNS: tl.constexpr):
    """Some columns of rows, fp64."""
    ds = d + tl.arange(0, COLUMNS)
    at = x_ptr + rows.to(tl.int64)[:, None] * D + ds[None, :]
    return tl.load(at, mask=mask[:, None] & (ds < D)[None, :], other=0.0).to(tl.float64)


@triton.jit
def _inner(x_ptr, y_ptr, rows, mask, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """<x, y> of each row."""
    total = tl.zeros((ROWS,), tl.float64)
    for d in range(0, D, COLUMNS):
        x = _tile(x_ptr, rows, mask, d, D, COLUMNS)
        total += tl.sum(x * _tile(y_ptr, rows, mask, d, D, COLUMNS), 1)
    return total


@triton.jit
def _norm(x_ptr, rows, mask, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The norm of each row, clamped, and NaN where fp32 does not hold its square: a finite number
    over infinity would be zero."""
    squared = _inner(x_ptr, x_ptr, rows, mask, D, ROWS, COLUMNS)
    norm = tl.where(squared > _LARGEST, float("nan"), tl.sqrt(squared))
    return tl.where(norm < EPS, EPS, norm)


@triton.jit
def _scale(
    x_ptr, factor_ptr, temperature, rows, mask, D, NORMALIZE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """1 / (norm temperature factor)."""
    by = tl.zeros((ROWS,), tl.float64) + temperature
    if factor_ptr is not None:
        by *= tl.load(factor_ptr)
    if NORMALIZE:
        by *= _norm(x_ptr, rows, mask, D, ROWS, COLUMNS)
    return 1.0 / by


@kernel
def _relational_kl_scales_kernel(
    x_ptr,  # [B, D]
    y_ptr,  # [B, E], or None
    own_ptr,  # [B, D], or None
    keys_ptr,  # [K, D]
    teacher_keys_ptr,  # [K, E], or None
    x_factor_ptr,  # [], or None
    y_factor_ptr,  # [], or None
    numbers_ptr,  # [7, B] fp32
    key_scales_ptr,  # [1 or 2, K] fp32, or None without NORMALIZE
    B,
    K,
    D,
    E,
    x_temperature,
    y_temperature,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scales of rows and the logits of their own keys; in programs beyond them, scales of keys."""
    of_rows = tl.cdiv(B, ROWS)
    block = tl.program_id(0)
    if block < of_rows:
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = rows < B
        to = numbers_ptr + rows.to(tl.int64)
        step = tl.cast(B, tl.int64)
        zero = tl.zeros((ROWS,), tl.float32)
        scale_s = _scale(
            x_ptr, x_factor_ptr, x_temperature, rows, mask, D, NORMALIZE, ROWS, COLUMNS
        ).to(tl.float32)
        scale_t, scale_own, own_s, own_t = zero, zero, zero, zero
        if y_ptr is not None:
            scale_t = _scale(
                y_ptr, y_factor_ptr, y_temperature, rows, mask, E, NORMALIZE, ROWS, COLUMNS
            ).to(tl.float32)
        if own_ptr is not None:
            scale_own = _scale(own_ptr, None, 1.0, rows, mask, D, NORMALIZE, ROWS, COLUMNS)
            scale_own = scale_own.to(tl.float32)
            product = _inner(x_ptr, own_ptr, rows, mask, D, ROWS, COLUMNS)
            own_s = (product * scale_own).to(tl.float32) * scale_s
            if y_ptr is not None:
                product = _inner(y_ptr, own_ptr, rows, mask, D, ROWS, COLUMNS)
                own_t = (product * scale_own).to(tl.float32) * scale_t
        tl.store(to + LSE_T * step, zero, mask=mask)
        tl.store(to + SCALE_S * step, scale_s, mask=mask)
        tl.store(to + SCALE_T * step, scale_t, mask=mask)
        tl.store(to + SCALE_OWN * step, scale_own, mask=mask)
        tl.store(to + OWN_S * step, own_s, mask=mask)
        tl.store(to + OWN_T * step, own_t, mask=mask)
    elif NORMALIZE:
        block -= of_rows
        of_bank = tl.cdiv(K, ROWS)
        keys = block % of_bank * ROWS + tl.arange(0, ROWS)
        mask = keys < K
        to = key_scales_ptr + keys
        if teacher_keys_ptr is None or block < of_bank:
            scale = 1.0 / _norm(keys_ptr, keys, mask, D, ROWS, COLUMNS)
            tl.store(to, scale.to(tl.float32), mask=mask)
        else:
            scale = 1.0 / _norm(teacher_keys_ptr, keys, mask, E, ROWS, COLUMNS)
            tl.store(to + K, scale.to(tl.float32), mask=mask)


@triton.jit
def _derivative(
    v_ptr, x_ptr, y_ptr, by_v, by_x, by_y, rows, mask, d, D, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """by_v v + by_x x + by_y y, of those that are there."""
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    if v_ptr is not None:
        total += by_v[:, None] * _tile(v_ptr, rows, mask, d, D, COLUMNS)
    if x_ptr is not None:
        total += by_x[:, None] * _tile(x_ptr, rows, mask, d, D, COLUMNS)
    if y_ptr is not None:
        total += by_y[:, None] * _tile(y_ptr, rows, mask, d, D, COLUMNS)
    return total


@triton.jit
def _through_scale(
    z_ptr,  # [n, D], the rows themselves
    scale,  # [ROWS]
    out_ptr,  # [n, D], or None
    v_ptr, x_ptr, y_ptr, by_v, by_x, by_y,  # as `_derivative` takes them
    rows, mask, D, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of rows z from that of their multiples by `scale`, the sum of by_v v ...;
    returns its inner product with z. A norm that the clamp holds does not depend on z."""
    squared = tl.zeros((ROWS,), tl.float64)
    along = tl.zeros((ROWS,), tl.float64)
    for d in range(0, D, COLUMNS):
        z = _tile(z_ptr, rows, mask, d, D, COLUMNS)
        v = _derivative(v_ptr, x_ptr, y_ptr, by_v, by_x, by_y, rows, mask, d, D, ROWS, COLUMNS)
        squared += tl.sum(z * z, 1)
        along += tl.sum(z * v, 1)
    if out_ptr is not None:
        radial = tl.zeros((ROWS,), tl.float64)
        if NORMALIZE:
            constant = tl.sqrt(squared) < EPS
            radial = tl.where(constant, 0.0, along / tl.where(constant, 1.0, squared))
        for d in range(0, D, COLUMNS):
            z = _tile(z_ptr, rows, mask, d, D, COLUMNS)
            v = _derivative(v_ptr, x_ptr, y_ptr, by_v, by_x, by_y, rows, mask, d, D, ROWS, COLUMNS)
            dz = (scale[:, None] * (v - radial[:, None] * z)).to(tl.float32)
            ds = d + tl.arange(0, COLUMNS)
            at = out_ptr + rows.to(tl.int64)[:, None] * D + ds[None, :]
            stored = mask[:, None] & (ds < D)[None, :]
            tl.store(at, dz.to(out_ptr.dtype.element_ty), mask=stored)
    return along


@kernel
def _relational_kl_bwd_rows_kernel(
    v_ptr,  # [B, D] fp32: derivatives by the rows times their scales, of the student less dout
    x_ptr,  # [B, D], or None where it is neither the student's gradient nor that of its own keys
    y_ptr,  # [B, E], or None without a teacher
    own_ptr,  # [B, D], or None
    numbers_ptr,  # [7, B] fp32
    loss_ptr,  # [B] fp32
    dout_ptr,  # [B] fp32
    factor_ptr,  # [], or None
    out_ptr,  # [B, D], or None where only dfactor is asked for
    dfactor_ptr,  # [B] fp32, or None
    B,
    D,
    stride_dout,
    OF: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of student, teacher or own keys."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < B
    step = tl.cast(B, tl.int64)
    of_row = numbers_ptr + rows
    dout = tl.load(dout_ptr + rows * stride_dout, mask=mask, other=0.0).to(tl.float64)
    scale = tl.load(of_row + (SCALE_S + OF) * step, mask=mask, other=0.0).to(tl.float64)
    one = tl.full((ROWS,), 1.0, tl.float64)
    by_own_s, by_own_t = one, one
    if own_ptr is not None:
        log_q = tl.load(of_row + OWN_S * step, mask=mask, other=0.0)
        log_q = (log_q - tl.load(of_row + LSE_S * step, mask=mask, other=0.0)).to(tl.float64)
        p = one
        if y_ptr is not None:
            log_p = tl.load(of_row + OWN_T * step, mask=mask, other=0.0)
            log_p = (log_p - tl.load(of_row + LSE_T * step, mask=mask, other=0.0)).to(tl.float64)
            p = tl.exp(log_p)
            c = log_p - log_q if ENTROPY else -log_q
            by_own_t = dout * p * (c - tl.load(loss_ptr + rows, mask=mask, other=0.0))
        by_own_s = dout * (tl.exp(log_q) - p)
    if OF == _OWN:
        by_x = by_own_s * tl.load(of_row + SCALE_S * step, mask=mask, other=0.0)
        by_y = by_own_t * tl.load(of_row + SCALE_T * step, mask=mask, other=0.0)
        _through_scale(
            own_ptr, scale, out_ptr, None, x_ptr, y_ptr, one, by_x, by_y, rows, mask, D, NORMALIZE,
            ROWS, COLUMNS,
        )  # fmt: skip
    else:
        by_own = tl.load(of_row + SCALE_OWN * step, mask=mask, other=0.0).to(tl.float64)
        if OF == _STUDENT:
            along = _through_scale(
                x_ptr, scale, out_ptr, v_ptr, own_ptr, None, dout, by_own * by_own_s, one, rows,
                mask, D, NORMALIZE, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            along = _through_scale(
                y_ptr, scale, out_ptr, v_ptr, own_ptr, None, one, by_own * by_own_t, one, rows,
                mask, D, NORMALIZE, ROWS, COLUMNS,
            )  # fmt: skip
        if dfactor_ptr is not None:
            dfactor = -scale * along / tl.load(factor_ptr)
            tl.store(dfactor_ptr + rows, dfactor.to(tl.float32), mask=mask)


@kernel
def _relational_kl_bwd_keys_kernel(
    v_ptr,  # [K, D] fp32: derivatives by the keys over their norms
    keys_ptr,  # [K, D]
    scales_ptr,  # [K] fp32
    num_keys_ptr,  # [] int64, or None
    out_ptr,  # [K, D], may be v
    K,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of keys, 0 where they do not count: their norms may be anything."""
    keys = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counting = K
    if num_keys_ptr is not None:
        counting = tl.minimum(tl.load(num_keys_ptr), K)
    one = tl.full((ROWS,), 1.0, tl.float64)
    scale = tl.load(scales_ptr + keys, mask=keys < counting, other=0.0).to(tl.float64)
    _through_scale(
        keys_ptr, scale, out_ptr, v_ptr, None, None, one, one, one, keys, keys < counting, D, True,
        ROWS, COLUMNS,
    )  # fmt: skip
    if num_keys_ptr is not None:
        beyond = (keys >= counting) & (keys < K)
        for d in range(0, D, COLUMNS):
            ds = d + tl.arange(0, COLUMNS)
            at = out_ptr + keys.to(tl.int64)[:, None] * D + ds[None, :]
            zero = tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty)
            tl.store(at, zero, mask=beyond[:, None] & (ds < D)[None, :])
