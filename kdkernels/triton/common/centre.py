# SPDX-License-Identifier: Apache-2.0
"""Rows as products of distances take them: less a common point, with their squared norms.

Distances do not change when all rows are moved by one vector, and |x|^2 + |r|^2 - 2 <x, r> of rows
around 0 keeps its digits where that of rows far from 0 loses them. docs/numerics.md derives what is
done in which dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.distances import FINITE
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import COLUMNS, ROWS, cdiv

SAMPLE = 256  # rows that tell the point
_SAMPLE_COLUMNS = 16  # of a program
# Columns of larger numbers are not moved, so that a norm hardly grows beyond what it was.
_MOVED = tl.constexpr(2.0**30)


class Rows(NamedTuple):
    x: Tensor  # [N, D] or [G, N, D] for products: contiguous if they were moved
    given: Tensor  # as the caller has them
    norm: Tensor  # [N] or [G, N] fp32, squared, of x; infinite where the row given is not finite


def centred(x: Tensor, r: Tensor | None = None) -> tuple[Rows, Rows]:
    """The rows of both sides, [N, D] or [G, N, D] of any strides, or of x twice without r.

    fp32 rows are moved by a point near the mean of r. Rows of 16 bits stay as they are: their
    products are exact, and those of moved rows would not be.
    """
    moved = x.dtype == torch.float32
    references = x if r is None else r
    point = references
    if moved:
        *groups, M, D = references.shape
        point = torch.empty((*groups, D), dtype=torch.float32, device=x.device)
        if point.numel() > 0:
            G = groups[0] if groups else 1
            _centre_kernel[(G * cdiv(D, _SAMPLE_COLUMNS),)](
                x_ptr=references, point_ptr=point, M=M, D=D, step=max(cdiv(M, SAMPLE), 1),
                **_strides(references), SAMPLE=SAMPLE, COLUMNS=_SAMPLE_COLUMNS, num_warps=4,
            )  # fmt: skip
    rows = _moved(references, point, moved)
    return (rows if r is None else _moved(x, point, moved)), rows


def _moved(x: Tensor, point: Tensor, moved: bool) -> Rows:
    *groups, N, D = x.shape
    norm = torch.empty((*groups, N), dtype=torch.float32, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if moved else x
    if norm.numel() > 0:
        _moved_rows_kernel[((groups[0] if groups else 1) * cdiv(N, ROWS),)](
            x_ptr=x, point_ptr=point, out_ptr=out, norm_ptr=norm, N=N, D=D, **_strides(x),
            MOVED=moved, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return Rows(out, x, norm)


def _strides(x: Tensor) -> dict[str, int]:
    group, row, column = x.stride() if x.dim() == 3 else (0, *x.stride())
    return {"stride_g": group, "stride_n": row, "stride_d": column}


@kernel(counts=("M", "step"))
def _centre_kernel(
    x_ptr,  # [G, M, D]
    point_ptr,  # [G, D] fp32
    M,
    D,
    step,  # every so many rows one of the sample
    stride_g,
    stride_n,
    stride_d,
    SAMPLE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The mean of each column of a sample, in multiples of a power of two of the order of its
    deviation s, between 2 s and 4 s: equal distances of rows of few bits stay equal, and columns
    around 0 are not moved."""
    blocks = tl.cdiv(D, COLUMNS)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, SAMPLE) * step
    x = tl.load(
        x_ptr + g * stride_g + rows.to(tl.int64)[:, None] * stride_n
        + columns.to(tl.int64)[None, :] * stride_d,
        mask=(rows < M)[:, None] & (columns < D)[None, :],
        other=float("nan"),
    ).to(tl.float32)  # fmt: skip
    usable = tl.abs(x) < _MOVED
    number = tl.maximum(tl.sum(usable.to(tl.float32), 0), 1.0)
    # offsets from one of the numbers, so that equal ones have their exact mean
    origin = tl.max(tl.where(usable, x, -_MOVED), 0)
    origin = tl.where(origin > -_MOVED, origin, 0.0)
    offset = tl.where(usable, x - origin[None, :], 0.0)
    mean = tl.sum(offset, 0) / number
    deviation = tl.where(usable, offset - mean[None, :], 0.0)
    twice = 2.0 * tl.sqrt_rn(tl.sum(deviation * deviation, 0) / number)
    mean += origin
    # the exponent of 2 s alone is a power of two that is at most 2 s
    exponent = twice.to(tl.int32, bitcast=True) & 0x7F800000
    unit = 2.0 * exponent.to(tl.float32, bitcast=True)
    units = mean / tl.where(unit > 0.0, unit, 1.0)
    coarse = (unit > 0.0) & (tl.abs(units) < 4194304.0)
    point = tl.where(coarse, tl.floor(units + 0.5) * unit, mean)
    tl.store(point_ptr + g * D + columns, point, mask=columns < D)


@kernel(counts=("N",))
def _moved_rows_kernel(
    x_ptr,  # [G, N, D]
    point_ptr,  # [G, D] fp32, with MOVED
    out_ptr,  # [G, N, D], with MOVED
    norm_ptr,  # [G, N] fp32
    N,
    D,
    stride_g,
    stride_n,
    stride_d,
    MOVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x - point and its squared norms, each rounded once."""
    blocks = tl.cdiv(N, ROWS)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    rows = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    x_ptrs = x_ptr + g * stride_g + rows[:, None] * stride_n
    out = (g * N + rows[:, None]) * D
    given = tl.zeros((ROWS, COLUMNS), tl.float64)
    moved = tl.zeros((ROWS, COLUMNS), tl.float64)
    for d in range(0, D, COLUMNS):
        columns = (d + tl.arange(0, COLUMNS)).to(tl.int64)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptrs + columns[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
        wide = x.to(tl.float64)
        given += wide * wide
        if MOVED:
            point = tl.load(point_ptr + g * D + columns, mask=columns < D, other=0.0)
            x = tl.where(mask, x - point[None, :], 0.0)
            tl.store(out_ptr + out + columns[None, :], x, mask=mask)
            wide = x.to(tl.float64)
            moved += wide * wide
    norm = tl.sum(given, 1).to(tl.float32)
    if MOVED:
        norm = tl.where(norm < FINITE, tl.sum(moved, 1).to(tl.float32), float("inf"))
    tl.store(norm_ptr + g * N + rows, norm, mask=rows < N)
