# SPDX-License-Identifier: Apache-2.0
"""Rows in the order of their labels, and what is found for them back in the order of the caller."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.norms import EPS, inverse_norm


@kernel(counts=("M",))
def _sorted_rows_kernel(
    x_ptr,  # [B, D], contiguous
    r_ptr,  # [M, D]; not read with IN_BATCH, nor what follows of r
    order_ptr,  # [B] int64: rows in the order of their labels
    r_order_ptr,  # [M] int64
    label_ptr,  # [B] int64, ascending
    r_label_ptr,  # [M] int64, ascending
    x_out_ptr,  # [B, D]: rows in that order, with NORMALIZE unit rows in fp32
    r_out_ptr,  # [M, D]
    begin_ptr,  # [B] int64: where the references with the label of each row begin and end, and
    end_ptr,  # [B] int64
    place_ptr,  # [M] int64: the place of each reference in the order; all three with STRETCHES
    B,
    M,
    D,
    IN_BATCH: tl.constexpr,
    STRETCHES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    blocks = tl.cdiv(B, ROWS)
    if IN_BATCH or block < blocks:
        rows = block * ROWS + tl.arange(0, ROWS)
        _take(x_ptr, order_ptr, x_out_ptr, rows, B, D, NORMALIZE, ROWS, COLUMNS)
        if STRETCHES:
            label = tl.load(label_ptr + rows, mask=rows < B, other=0)
            begin = _number_before(r_label_ptr, label, M, False, ROWS)
            end = _number_before(r_label_ptr, label, M, True, ROWS)
            tl.store(begin_ptr + rows, begin.to(tl.int64), mask=rows < B)
            tl.store(end_ptr + rows, end.to(tl.int64), mask=rows < B)
            if IN_BATCH:
                _place(place_ptr, order_ptr, rows, B)
    else:
        rows = (block - blocks) * ROWS + tl.arange(0, ROWS)
        _take(r_ptr, r_order_ptr, r_out_ptr, rows, M, D, NORMALIZE, ROWS, COLUMNS)
        if STRETCHES:
            _place(place_ptr, r_order_ptr, rows, M)


@triton.jit
def _place(place_ptr, order_ptr, rows, N):
    taken = tl.load(order_ptr + rows, mask=rows < N, other=0)
    tl.store(place_ptr + taken, rows.to(tl.int64), mask=rows < N)


@triton.jit
def _take(
    x_ptr, order_ptr, out_ptr, rows, N, D, NORMALIZE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    taken = tl.load(order_ptr + rows, mask=rows < N, other=0)
    scale = tl.full((ROWS,), 1.0, tl.float64)
    if NORMALIZE:
        acc = tl.zeros((ROWS, COLUMNS), tl.float64)
        for column in range(0, D, COLUMNS):
            cols = column + tl.arange(0, COLUMNS)
            mask = (rows < N)[:, None] & (cols < D)[None, :]
            x = tl.load(x_ptr + taken[:, None] * D + cols[None, :], mask=mask, other=0.0)
            x = x.to(tl.float64)
            acc += x * x
        scale = inverse_norm(tl.sum(acc, 1))
    for column in range(0, D, COLUMNS):
        cols = column + tl.arange(0, COLUMNS)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + taken[:, None] * D + cols[None, :], mask=mask, other=0.0)
        if NORMALIZE:
            x = (x.to(tl.float64) * scale[:, None]).to(tl.float32)
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * D + cols[None, :], x, mask=mask)


@triton.jit
def _number_before(
    label_ptr,  # [M] int64, ascending
    label,  # [ROWS] int64
    M,
    OR_EQUAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """How many labels come before each label, or with OR_EQUAL do not come after it."""
    low = tl.zeros((ROWS,), tl.int32)
    high = low + M
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        found = tl.load(label_ptr + middle, mask=low < high, other=0)
        before = (found <= label) if OR_EQUAL else (found < label)
        before = before & (low < high)
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
        high = tl.maximum(low, high)
    return low


@kernel(counts=("N",))
def _given_gradient_kernel(
    a_ptr,  # [N, D] fp32: the gradient of sorted rows, or a part of it
    b_ptr,  # [N, D] fp32: another part, with TWO
    x_ptr,  # [N, D]: rows as they were given, with NORMALIZE
    order_ptr,  # [N] int64
    out_ptr,  # [N, D] fp32: the gradient of those
    N,
    D,
    TWO: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    taken = tl.load(order_ptr + rows, mask=rows < N, other=0)
    at = rows.to(tl.int64)[:, None] * D
    to = taken[:, None] * D
    scale = tl.full((ROWS,), 1.0, tl.float64)
    radial = tl.zeros((ROWS,), tl.float64)
    if NORMALIZE:
        x2 = tl.zeros((ROWS, COLUMNS), tl.float64)
        xv = tl.zeros((ROWS, COLUMNS), tl.float64)
        for column in range(0, D, COLUMNS):
            cols = column + tl.arange(0, COLUMNS)
            mask = (rows < N)[:, None] & (cols < D)[None, :]
            v = _parts(a_ptr, b_ptr, at + cols[None, :], mask, TWO)
            x = tl.load(x_ptr + to + cols[None, :], mask=mask, other=0.0).to(tl.float64)
            x2 += x * x
            xv += x * v
        squared = tl.sum(x2, 1)
        scale = inverse_norm(squared)
        # in fp64: the radial part can far exceed what remains; a clamped norm has none
        radial = tl.sum(xv, 1) / tl.where(squared == 0.0, 1.0, squared)
        radial = tl.where(tl.sqrt(squared) < EPS, 0.0, radial)
    for column in range(0, D, COLUMNS):
        cols = column + tl.arange(0, COLUMNS)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        v = _parts(a_ptr, b_ptr, at + cols[None, :], mask, TWO)
        if NORMALIZE:
            x = tl.load(x_ptr + to + cols[None, :], mask=mask, other=0.0).to(tl.float64)
            v = (v - x * radial[:, None]) * scale[:, None]
        tl.store(out_ptr + to + cols[None, :], v.to(tl.float32), mask=mask)


@triton.jit
def _parts(a_ptr, b_ptr, offs, mask, TWO: tl.constexpr):
    v = tl.load(a_ptr + offs, mask=mask, other=0.0)
    if TWO:
        v += tl.load(b_ptr + offs, mask=mask, other=0.0)
    return v.to(tl.float64)


@kernel(counts=("n",))
def _sums_kernel(
    loss_ptr,  # [n] fp64
    nonzero_ptr,  # [n] int64
    valid_ptr,  # [n] int64, with VALID
    total_out_ptr,  # [] fp32
    nonzero_out_ptr,  # [] int64
    valid_out_ptr,  # [] int64, with VALID
    n,
    VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, so the order of the sum depends on n alone."""
    total = tl.zeros((BLOCK,), tl.float64)
    nonzero = tl.zeros((BLOCK,), tl.int64)
    valid = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, n, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        total += tl.load(loss_ptr + offs, mask=offs < n, other=0.0)
        nonzero += tl.load(nonzero_ptr + offs, mask=offs < n, other=0)
        if VALID:
            valid += tl.load(valid_ptr + offs, mask=offs < n, other=0)
    tl.store(total_out_ptr, tl.sum(total, 0).to(tl.float32))
    tl.store(nonzero_out_ptr, tl.sum(nonzero, 0))
    if VALID:
        tl.store(valid_out_ptr, tl.sum(valid, 0))
