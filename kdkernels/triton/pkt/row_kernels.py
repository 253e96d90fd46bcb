# SPDX-License-Identifier: Apache-2.0
"""What pkt computes of single rows and of columns, before its tiles of pairs and after them.

Sums over rows are made in splits, which the kernels that need them add up themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.pkt.kernels import INVERSE, LOST, NORM, SCALE, SELF


@triton.jit
def _load(x_ptr, rows, mask_m, d, D, stride_m, stride_d, COLUMNS: tl.constexpr):
    """(columns from d on, which of them are there, [m, columns] fp32)"""
    offs_d = d + tl.arange(0, COLUMNS)
    # int64: a row number times a row stride passes 2**31 on large inputs
    at = x_ptr + rows.to(tl.int64)[:, None] * stride_m + offs_d.to(tl.int64)[None, :] * stride_d
    x = tl.load(at, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
    return offs_d, offs_d < D, x.to(tl.float32)


@triton.jit
def _store_norms(
    x_ptr, rows_ptr, B, D, stride_m, stride_d, eps, SIDE: tl.constexpr, COSINE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < B
    squared = tl.zeros((ROWS,), tl.float64)
    for d in range(0, D, COLUMNS):
        _, _, x = _load(x_ptr, rows, mask, d, D, stride_m, stride_d, COLUMNS)
        wide = x.to(tl.float64)
        squared += tl.sum(wide * wide, 1)
    at = rows_ptr + rows
    width = B.to(tl.int64)
    if COSINE:
        norm = tl.sqrt(squared).to(tl.float32)
        scale = 1.0 / (norm + eps)
        tl.store(at + (SCALE + SIDE) * width, scale, mask=mask)
        tl.store(at + (SELF + SIDE) * width, eps * scale, mask=mask)
        if SIDE == 0:
            tl.store(at + NORM * width, norm, mask=mask)
    else:
        tl.store(at + (SELF + SIDE) * width, squared.to(tl.float32), mask=mask)


@kernel
def _pkt_norms_kernel(
    s_ptr,  # [B, D_s], of student_t centred
    t_ptr,  # [B, D_t]
    rows_ptr,  # [8, B] fp32
    B,
    D_s,
    D_t,
    eps,
    stride_sm,
    stride_sd,
    stride_tm,
    stride_td,
    COSINE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # one body per side: a unit stride must stay known
    if tl.program_id(1) == 0:
        _store_norms(s_ptr, rows_ptr, B, D_s, stride_sm, stride_sd, eps, 0, COSINE, ROWS, COLUMNS)
    else:
        _store_norms(t_ptr, rows_ptr, B, D_t, stride_tm, stride_td, eps, 1, COSINE, ROWS, COLUMNS)


@triton.jit
def _lost(rows_ptr, sums_ptr, rows, mask, B, splits):
    """r_i / Z_i, with r in as many parts as the tiles were split into."""
    width = B.to(tl.int64)
    r = tl.zeros_like(rows).to(tl.float32)
    for split in range(splits):
        r += tl.load(sums_ptr + (splits + split) * width + rows, mask=mask, other=0.0)
    return r * tl.load(rows_ptr + INVERSE * width + rows, mask=mask, other=0.0)


@triton.jit
def _store_columns(
    x_ptr, rows_ptr, sums_ptr, parts_ptr, B, D, width, split_rows, splits, stride_m, stride_d,
    SIDE: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * split_rows
    d = tl.program_id(0) * COLUMNS
    total = tl.zeros((COLUMNS,), tl.float32)
    for m in range(first, tl.minimum(first + split_rows, B), ROWS):
        rows = m + tl.arange(0, ROWS)
        mask = rows < B
        scale = tl.load(rows_ptr + (SCALE + SIDE) * B.to(tl.int64) + rows, mask=mask, other=0.0)
        if WEIGHTED:
            scale *= _lost(rows_ptr, sums_ptr, rows, mask, B, splits)
        _, _, x = _load(x_ptr, rows, mask, d, D, stride_m, stride_d, COLUMNS)
        total += tl.sum(x * scale[:, None], 0)
    offs_d = d + tl.arange(0, COLUMNS)
    part = SIDE * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + part * width + offs_d, total, mask=offs_d < D)


@kernel
def _pkt_columns_kernel(
    s_ptr,  # [B, D_s]
    t_ptr,  # [B, D_t]
    rows_ptr,  # [8, B] fp32
    sums_ptr,  # [2, splits, B] fp32, with WEIGHTED: losses and r
    parts_ptr,  # [sides, parts, width] fp32
    B,
    D_s,
    D_t,
    width,  # the larger of them
    split_rows,  # of a part; a multiple of ROWS
    splits,
    stride_sm,
    stride_sd,
    stride_tm,
    stride_td,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of the unit rows u of each side, or with WEIGHTED those of u_j r_j / Z_j."""
    if tl.program_id(2) == 0:
        _store_columns(
            s_ptr, rows_ptr, sums_ptr, parts_ptr, B, D_s, width, split_rows, splits, stride_sm,
            stride_sd, 0, WEIGHTED, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _store_columns(
            t_ptr, rows_ptr, sums_ptr, parts_ptr, B, D_t, width, split_rows, splits, stride_tm,
            stride_td, 1, WEIGHTED, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _add_parts(parts_ptr, side, parts, offs_d, mask, width, COLUMNS: tl.constexpr):
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in range(parts):
        at = parts_ptr + (side * parts + part) * width + offs_d
        total += tl.load(at, mask=mask, other=0.0)
    return total


@triton.jit
def _store_inverse(
    x_ptr, rows_ptr, parts_ptr, B, D, width, parts, stride_m, stride_d, SIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < B
    inner = tl.zeros((ROWS,), tl.float64)
    for d in range(0, D, COLUMNS):
        offs_d, mask_d, x = _load(x_ptr, rows, mask, d, D, stride_m, stride_d, COLUMNS)
        inner += tl.sum(
            x.to(tl.float64) * _add_parts(parts_ptr, SIDE, parts, offs_d, mask_d, width, COLUMNS), 1
        )
    at = rows_ptr + rows
    stride = B.to(tl.int64)
    scale = tl.load(at + (SCALE + SIDE) * stride, mask=mask, other=0.0)
    z = 0.5 * (inner * scale.to(tl.float64) + B.to(tl.float64))
    tl.store(at + (INVERSE + SIDE) * stride, (1.0 / z).to(tl.float32), mask=mask)


@kernel
def _pkt_cosine_sums_kernel(
    s_ptr,  # [B, D_s]
    t_ptr,  # [B, D_t]
    rows_ptr,  # [8, B] fp32
    parts_ptr,  # [2, parts, width] fp32: sums of the unit rows
    B,
    D_s,
    D_t,
    width,
    parts,
    stride_sm,
    stride_sd,
    stride_tm,
    stride_td,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """1 / Z of both sides, Z_i = (<u_i, sum of u> + B) / 2."""
    if tl.program_id(1) == 0:
        _store_inverse(
            s_ptr, rows_ptr, parts_ptr, B, D_s, width, parts, stride_sm, stride_sd, 0, ROWS,
            COLUMNS,
        )  # fmt: skip
    else:
        _store_inverse(
            t_ptr, rows_ptr, parts_ptr, B, D_t, width, parts, stride_tm, stride_td, 1, ROWS,
            COLUMNS,
        )  # fmt: skip


@triton.jit
def _store_loss(loss_ptr, sums_ptr, B, splits, BLOCK: tl.constexpr):
    """In fp64, by one program: the losses of all rows, in as many parts as there are splits."""
    total = tl.zeros((BLOCK,), tl.float64)
    count = splits * B.to(tl.int64)
    for i in range(0, count, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + offs, mask=offs < count, other=0.0).to(tl.float64)
    tl.store(loss_ptr, tl.sum(total, 0).to(tl.float32))


@kernel
def _pkt_sums_kernel(
    sums_ptr,  # [2, splits, B] fp32: sums of K of both sides, or losses and r
    rows_ptr,  # [8, B] fp32
    loss_ptr,  # [] fp32, with LOSS
    B,
    splits,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / Z of both sides of student_t; or r, and by the first program the loss."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < B
    width = B.to(tl.int64)
    first = tl.zeros((BLOCK,), tl.float32)
    second = first
    for split in range(splits):
        at = sums_ptr + split * width + rows
        if not LOSS:
            first += tl.load(at, mask=mask, other=0.0)
        second += tl.load(at + splits * width, mask=mask, other=0.0)
    if LOSS:
        tl.store(rows_ptr + LOST * width + rows, second, mask=mask)
        if tl.program_id(0) == 0:
            _store_loss(loss_ptr, sums_ptr, B, splits, BLOCK)
    else:
        tl.store(rows_ptr + INVERSE * width + rows, 1.0 / first, mask=mask)
        tl.store(rows_ptr + (INVERSE + 1) * width + rows, 1.0 / second, mask=mask)


@triton.jit
def _du(
    dx_ptr, total_ptr, weighted_ptr, rows, mask, lost, offs_d, mask_d, D, width, parts,
    weighted_parts, COLUMNS: tl.constexpr,
):  # fmt: skip
    total = _add_parts(total_ptr, 0, parts, offs_d, mask_d, width, COLUMNS)
    weighted = _add_parts(weighted_ptr, 0, weighted_parts, offs_d, mask_d, width, COLUMNS)
    at = dx_ptr + rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    product = tl.load(at, mask=mask[:, None] & mask_d[None, :], other=0.0)
    return at, 0.5 * (product - (lost[:, None] * total[None, :] + weighted[None, :]))


@kernel(counts=("weighted_parts",))
def _pkt_cosine_bwd_kernel(
    x_ptr,  # [B, D]
    rows_ptr,  # [8, B] fp32
    sums_ptr,  # [2, splits, B] fp32: losses and r
    total_ptr,  # [parts, width] fp32: sum of u
    weighted_ptr,  # [weighted_parts, width] fp32: sum of u_j r_j / Z_j
    dx_ptr,  # [B, D] fp32: products W u, which become the gradient
    loss_ptr,  # [] fp32
    B,
    D,
    width,
    parts,
    weighted_parts,
    splits,
    stride_m,
    stride_d,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a few rows, and by the first program the loss."""
    if tl.program_id(0) == 0:
        _store_loss(loss_ptr, sums_ptr, B, splits, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < B
    lost = _lost(rows_ptr, sums_ptr, rows, mask, B, splits)
    norm = tl.load(rows_ptr + NORM * B.to(tl.int64) + rows, mask=mask, other=0.0).to(tl.float64)
    # in fp64: the radial part that is taken away can be much larger than what remains
    inner = tl.zeros((ROWS,), tl.float64)
    for d in range(0, D, COLUMNS):
        offs_d, mask_d, x = _load(x_ptr, rows, mask, d, D, stride_m, stride_d, COLUMNS)
        _, du = _du(
            dx_ptr, total_ptr, weighted_ptr, rows, mask, lost, offs_d, mask_d, D, width, parts,
            weighted_parts, COLUMNS,
        )  # fmt: skip
        inner += tl.sum(du.to(tl.float64) * x.to(tl.float64), 1)
    radial = tl.where(norm == 0.0, 0.0, inner / (norm * (norm + eps)))
    for d in range(0, D, COLUMNS):
        offs_d, mask_d, x = _load(x_ptr, rows, mask, d, D, stride_m, stride_d, COLUMNS)
        at, du = _du(
            dx_ptr, total_ptr, weighted_ptr, rows, mask, lost, offs_d, mask_d, D, width, parts,
            weighted_parts, COLUMNS,
        )  # fmt: skip
        dx = (du.to(tl.float64) - radial[:, None] * x.to(tl.float64)) / (norm + eps)[:, None]
        tl.store(at, dx.to(tl.float32), mask=mask[:, None] & mask_d[None, :])
