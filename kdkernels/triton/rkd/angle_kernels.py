# SPDX-License-Identifier: Apache-2.0
"""Squared distances from differences in fp64, and all angles from them."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.rkd.distance_kernels import huber_slope, sum_all


@triton.jit
def _store_squares(
    x_ptr, out_ptr, B, D, split_length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
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
        inside = (offs_m < B)[:, None] & (offs_n < B)[None, :]
        wide_m = offs_m.to(tl.int64)
        wide_n = offs_n.to(tl.int64)
        tl.store(out_ptr + wide_m[:, None] * B + offs_n[None, :], acc, mask=inside)
        tl.store(out_ptr + wide_n[None, :] * B + offs_m[:, None], acc, mask=inside)


@kernel
def _rkd_squares_kernel(
    s_ptr,  # [D_s, B]
    t_ptr,  # [D_t, B]
    out_ptr,  # [2, splits, B, B] fp64
    B,
    D_s,
    D_t,
    split_length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of squares over a split of the columns, of both sides, in tiles on or above the
    diagonal; a row with itself gives 0."""
    part = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    out_ptr += part.to(tl.int64) * B * B
    if tl.program_id(2) == 0:
        _store_squares(s_ptr, out_ptr, B, D_s, split_length, BLOCK_M, BLOCK_N)
    else:
        _store_squares(t_ptr, out_ptr, B, D_t, split_length, BLOCK_M, BLOCK_N)


@kernel
def _rkd_largest_kernel(
    q_ptr,  # [2, splits, B, B] fp64; the first of the splits becomes their sum
    largest_ptr,  # [2, parts] fp64, NaN where one of the numbers is NaN
    B,
    splits,
    split_span,  # numbers of a part; a multiple of BLOCK
    BLOCK: tl.constexpr,
):
    size = tl.cast(B, tl.int64) * B
    q_ptr += tl.program_id(1) * splits * size
    largest = tl.zeros((BLOCK,), tl.float64)
    bad = tl.zeros((BLOCK,), tl.float64)
    first = tl.program_id(0).to(tl.int64) * split_span
    for i in range(first, tl.minimum(first + split_span, size), BLOCK):
        offs = i + tl.arange(0, BLOCK)
        mask = offs < size
        q = tl.load(q_ptr + offs, mask=mask, other=0.0)
        for split in range(1, splits):
            q += tl.load(q_ptr + split * size + offs, mask=mask, other=0.0)
        tl.store(q_ptr + offs, q, mask=mask)
        largest = tl.maximum(largest, q)
        bad += tl.where(q == q, 0.0, q)  # a maximum may lose NaN
    at = largest_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, tl.max(largest, 0) + tl.sum(bad, 0))


@triton.jit
def _largest(largest_ptr, parts, PARTS: tl.constexpr):
    """Of all parts of a side, but 1 in place of 0; NaN stays."""
    offs = tl.arange(0, PARTS)
    found = tl.load(largest_ptr + offs, mask=offs < parts, other=0.0)
    largest = tl.max(found, 0) + tl.sum(tl.where(found == found, 0.0, found), 0)
    return tl.where(largest == 0.0, 1.0, largest)


@triton.jit
def _store_pieces(q_ptr, largest_ptr, out_ptr, offs, mask, size, parts, PARTS: tl.constexpr):
    """Squared distances over the largest one; whether they are 0."""
    q = tl.load(q_ptr + offs, mask=mask, other=0.0) / _largest(largest_ptr, parts, PARTS)
    high = q.to(tl.float32)
    zero = q == 0.0
    tl.store(out_ptr + offs, high, mask=mask)
    tl.store(out_ptr + size + offs, (q - high.to(tl.float64)).to(tl.float32), mask=mask)
    inverse = tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, q)))
    tl.store(out_ptr + 2 * size + offs, inverse.to(tl.float32), mask=mask)
    return high == 0.0


@kernel
def _rkd_pieces_kernel(
    q_ptr,  # [2, splits, B, B] fp64: squared distances, where `split` is 0
    largest_ptr,  # [2, parts] fp64
    out_ptr,  # [2, 3, B, B] fp32, as `_rkd_angles_kernel` takes them
    apart_ptr,  # [blocks] int32: how many pairs are at one place on one side only
    B,
    splits,
    parts,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = tl.cast(B, tl.int64) * B
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    s = _store_pieces(q_ptr, largest_ptr, out_ptr, offs, mask, size, parts, PARTS)
    t = _store_pieces(
        q_ptr + splits * size, largest_ptr + parts, out_ptr + 3 * size, offs, mask, size, parts,
        PARTS,
    )  # fmt: skip
    tl.store(apart_ptr + tl.program_id(0), tl.sum((s != t).to(tl.int32), 0))


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


@kernel(counts=("sums", "counts"))
def _rkd_weights_kernel(
    pairs_ptr,  # [splits, B, B] fp32: derivatives by q_mn as that of a pair, above the diagonal
    vertices_ptr,  # [splits, B, B] fp32: derivatives by q_mn with the vertex at m
    largest_ptr,  # [2, parts] fp64: what the student's squared distances were divided by
    losses_ptr,  # [sums] fp64
    apart_ptr,  # [counts] int32: pairs that are at one place on one side only
    weights_ptr,  # [B, B] fp64
    loss_ptr,  # [] fp32
    B,
    splits,
    parts,
    sums,
    counts,
    DERIVATIVE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss, by the first program; and the weights W with which the gradient is W x: a row of
    them sums to 0."""
    count = tl.cast(B, tl.float64)
    cubed = count * count * count
    if tl.program_id(0) == 0:
        # where a row is at the place of another on one side only, the angle between the two and
        # itself is 0 there and 1 on the other side; `apart` counts each of these pairs twice
        apart = 0.5 * sum_all(apart_ptr, counts, BLOCK)
        loss = (2.0 * sum_all(losses_ptr, sums, BLOCK) + apart) / cubed
        tl.store(loss_ptr, loss.to(tl.float32))
    if DERIVATIVE:
        size = tl.cast(B, tl.int64) * B
        factor = 4.0 / (cubed * _largest(largest_ptr, parts, PARTS))
        i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        total = tl.zeros((ROWS,), tl.float64)
        for n in range(0, B, COLUMNS):
            j = (n + tl.arange(0, COLUMNS)).to(tl.int64)
            apart = (i < B)[:, None] & (j < B)[None, :] & (i[:, None] != j[None, :])
            above = tl.minimum(i[:, None], j[None, :]) * B + tl.maximum(i[:, None], j[None, :])
            here = i[:, None] * B + j[None, :]
            there = j[None, :] * B + i[:, None]
            w = tl.zeros((ROWS, COLUMNS), tl.float32)
            for split in range(splits):
                part = split * size
                w += tl.load(pairs_ptr + part + above, mask=apart, other=0.0)
                w += tl.load(vertices_ptr + part + here, mask=apart, other=0.0)
                w += tl.load(vertices_ptr + part + there, mask=apart, other=0.0)
            # in fp64, since the gradient is a difference of products
            wide = w.to(tl.float64) * factor
            total += tl.sum(wide, 1)
            tl.store(weights_ptr + here, -wide, mask=apart)
        tl.store(weights_ptr + i * B + i, total, mask=i < B)
