# SPDX-License-Identifier: Apache-2.0
"""Squared distances from differences in fp64, and all angles from them."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.rkd.distance_kernels import huber_slope


@kernel
def _rkd_squares_kernel(
    x_ptr,  # [D, B]
    out_ptr,  # [splits, B, B] fp64
    B,
    D,
    split_length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of squares over a split of D, above the diagonal of tiles; a row with itself gives 0."""
    m_blocks = tl.cdiv(B, BLOCK_M)
    offs_m = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.min(offs_m) <= tl.max(offs_n):
        at_m = tl.minimum(offs_m, B - 1)
        at_n = tl.minimum(offs_n, B - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
        first = tl.program_id(1) * split_length
        for k in range(first, tl.minimum(first + split_length, D)):
            column = x_ptr + tl.cast(k, tl.int64) * B
            x = tl.load(column + at_m).to(tl.float64)
            y = tl.load(column + at_n).to(tl.float64)
            difference = x[:, None] - y[None, :]
            acc += difference * difference
        out_ptr += tl.program_id(1).to(tl.int64) * B * B
        inside = (offs_m < B)[:, None] & (offs_n < B)[None, :]
        wide_m = offs_m.to(tl.int64)
        wide_n = offs_n.to(tl.int64)
        tl.store(out_ptr + wide_m[:, None] * B + offs_n[None, :], acc, mask=inside)
        tl.store(out_ptr + wide_n[None, :] * B + offs_m[:, None], acc, mask=inside)


@triton.jit
def _load(q_ptr, offs, size):
    """Squared distances in two pieces, and the inverse distances."""
    low_ptr = q_ptr + size
    inverse_ptr = low_ptr + size
    return tl.load(q_ptr + offs), tl.load(low_ptr + offs), tl.load(inverse_ptr + offs)


@triton.jit
def _sum_of_three(a, a_low, b, b_low, c, c_low):
    """a + b - c in two pieces each: what a small difference of large ones needs."""
    larger = tl.maximum(a, b)
    smaller = tl.minimum(a, b)
    return ((larger - c) + smaller) + ((a_low + b_low) - c_low)


@triton.jit
def _cosines(
    u, u_low, u_inverse,  # [m, 1]
    w, w_low, w_inverse,  # [1, n]
    z, z_low, z_inverse,  # [m, n]
    VERTEX_IN_TILE: tl.constexpr,
):  # fmt: skip
    """Of the angle at x between the rows m and n of a tile, or of that at m between x and n."""
    if VERTEX_IN_TILE:
        return 0.5 * _sum_of_three(u, u_low, z, z_low, w, w_low) * (u_inverse * z_inverse)
    else:
        return 0.5 * _sum_of_three(u, u_low, w, w_low, z, z_low) * (u_inverse * w_inverse)


@kernel
def _rkd_angles_kernel(
    s_ptr,  # [3, B, B] fp32: squared distances, what their rounding left, 1 / distance or 0
    t_ptr,  # the same of the teacher
    out_ptr,  # [splits, B, B] fp32: derivatives by the student's squared distances
    loss_ptr,  # [splits, tiles] fp64
    B,
    split_length,
    VERTEX_IN_TILE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over the rows x of a split, with q the squared distances and r = 1 / distance.

    Vertices x, pairs m < n of a tile: the loss, and its derivatives by q_mn, the sums of
    -g r_xm r_xn / 2. Or vertices m, other rows n and x of a pair: the derivatives by q_mn, the sums
    of g (r_mx r_mn / 2 - psi r_mn^2 / 2).
    """
    m_blocks = tl.cdiv(B, BLOCK_M)
    offs_m = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    size = tl.cast(B, tl.int64) * B
    loss = 0.0
    if VERTEX_IN_TILE or tl.min(offs_m) < tl.max(offs_n):
        at_m = tl.minimum(offs_m, B - 1)[:, None]
        at_n = tl.minimum(offs_n, B - 1)[None, :]
        within = at_m.to(tl.int64) * B + at_n
        zs, zs_low, zs_inverse = _load(s_ptr, within, size)
        zt, zt_low, zt_inverse = _load(t_ptr, within, size)
        losses = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        cosines = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first = tl.program_id(1) * split_length
        for x in range(first, tl.minimum(first + split_length, B)):
            row = tl.cast(x, tl.int64) * B
            us, us_low, us_inverse = _load(s_ptr + row, at_m, size)
            ws, ws_low, ws_inverse = _load(s_ptr + row, at_n, size)
            ut, ut_low, ut_inverse = _load(t_ptr + row, at_m, size)
            wt, wt_low, wt_inverse = _load(t_ptr + row, at_n, size)
            psi = _cosines(
                us, us_low, us_inverse, ws, ws_low, ws_inverse, zs, zs_low, zs_inverse,
                VERTEX_IN_TILE,
            )  # fmt: skip
            e = psi - _cosines(
                ut, ut_low, ut_inverse, wt, wt_low, wt_inverse, zt, zt_low, zt_inverse,
                VERTEX_IN_TILE,
            )  # fmt: skip
            g = huber_slope(e)
            if VERTEX_IN_TILE:
                g = tl.where(at_n == x, 0.0, g)  # an angle between a row and itself is constant
                products += g * us_inverse
                cosines += g * psi
            else:
                losses += g * (e - 0.5 * g)
                if DERIVATIVE:
                    products += g * (us_inverse * ws_inverse)
        inside = (offs_m < B)[:, None] & (offs_n < B)[None, :]
        if not VERTEX_IN_TILE:
            inside = inside & (offs_m[:, None] < offs_n[None, :])
            loss = tl.sum(tl.where(inside, losses, 0.0))
        if DERIVATIVE:
            if VERTEX_IN_TILE:
                out = 0.5 * zs_inverse * (products - cosines * zs_inverse)
            else:
                out = -0.5 * products
            out_ptr += tl.program_id(1) * size
            tl.store(out_ptr + within, out, mask=inside)
    if not VERTEX_IN_TILE:
        at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(loss_ptr + at, loss.to(tl.float64))
