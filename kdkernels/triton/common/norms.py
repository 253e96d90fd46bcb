# SPDX-License-Identifier: Apache-2.0
"""Norms of rows, and the gradient through rows that were divided by them."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import COLUMNS, ROWS, cdiv
from kdkernels.triton.common.prepared import REMEMBERED, Launch

EPS = tl.constexpr(1e-12)  # the clamp of F.normalize, on the norm


@lru_cache(REMEMBERED)
def _normalise_gradient(shape: tuple[int, ...], strides: tuple[int, ...]) -> Launch:
    (G, B, D), (stride_g, stride_b, stride_d) = shape, strides
    return Launch(
        _normalise_gradient_kernel, (G * cdiv(B, ROWS),), B=B, D=D, stride_g=stride_g,
        stride_b=stride_b, stride_d=stride_d, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip


def normalise_gradient(x: Tensor, v: Tensor) -> Tensor:
    """The gradient of features from `v`, that of the unit vectors x / |x| divided by |x|."""
    dx = x.new_empty(x.shape)
    _normalise_gradient(x.shape, x.stride())(x_ptr=x, v_ptr=v, dx_ptr=dx)
    return dx


@triton.jit
def inverse_norm(squared):
    """1 / norm in fp64, the norm clamped at EPS; NaN where its square overflows in fp32."""
    norm = tl.sqrt(squared)
    inverse = 1.0 / tl.where(norm < EPS, EPS, norm)
    return tl.where(squared.to(tl.float32) < float("inf"), inverse, float("nan"))


@triton.jit
def row_statistics(
    x_ptr,  # [N, D], contiguous
    rows,
    N,
    D,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(what each row is multiplied by, its squared norm then), fp32.

    The factor is 1, or with NORMALIZE the inverse of the norm, NaN where the norm overflows.
    """
    acc = tl.zeros((ROWS, COLUMNS), tl.float64)
    for column in range(0, D, COLUMNS):
        cols = column + tl.arange(0, COLUMNS)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        offs = rows.to(tl.int64)[:, None] * D + cols[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        acc += x * x
    squared = tl.sum(acc, 1)
    norm = squared.to(tl.float32)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALIZE:
        scale = inverse_norm(squared).to(tl.float32)
        wide = scale.to(tl.float64)
        norm = (squared * wide * wide).to(tl.float32)
    return scale, norm


@kernel
def _normalise_gradient_kernel(
    x_ptr,  # [G, B, D] features
    v_ptr,  # [G, B, D] fp32: the gradient of the unit vectors u = x / |x|, divided by |x|
    dx_ptr,  # [G, B, D]
    B,
    D,
    stride_g,
    stride_b,
    stride_d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx = v - u <u, v>, in fp64: the radial part taken away can far exceed what remains."""
    blocks = tl.cdiv(B, ROWS)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    rows = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    x_ptrs = x_ptr + g * stride_g + rows[:, None] * stride_b
    offs_v = (g * B + rows[:, None]) * D
    x2 = tl.zeros((ROWS,), tl.float64)
    xv = tl.zeros((ROWS,), tl.float64)
    for d in range(0, D, COLUMNS):
        offs_d = (d + tl.arange(0, COLUMNS)).to(tl.int64)
        mask = (rows < B)[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptrs + offs_d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float64)
        v = tl.load(v_ptr + offs_v + offs_d[None, :], mask=mask, other=0.0).to(tl.float64)
        x2 += tl.sum(x * x, 1)
        xv += tl.sum(x * v, 1)
    # a norm that the clamp holds does not depend on x: no radial part
    radial = tl.where(tl.sqrt(x2) < EPS, 0.0, xv / tl.where(x2 == 0.0, 1.0, x2))
    for d in range(0, D, COLUMNS):
        offs_d = (d + tl.arange(0, COLUMNS)).to(tl.int64)
        mask = (rows < B)[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptrs + offs_d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float64)
        v = tl.load(v_ptr + offs_v + offs_d[None, :], mask=mask, other=0.0).to(tl.float64)
        dx = (v - x * radial[:, None]).to(tl.float32)
        tl.store(dx_ptr + offs_v + offs_d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
