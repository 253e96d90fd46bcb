# SPDX-License-Identifier: Apache-2.0
"""Kernels of triplet.

A search keeps, per anchor, the smallest (key, row). The key of a candidate is its squared distance
to look for the nearest and minus that for the farthest; -inf where that distance is NaN, because
the candidate or the anchor is not finite; +inf means none. Splits of the references leave partial
winners that are merged in a fixed order. Sums over chosen rows are in a fixed order too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.distances import (
    EUCLIDEAN,
    FINITE,
    LARGEST,
    SQEUCLIDEAN,
    close_share,
)
from kdkernels.triton.common.dots import dot

_NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def _winner(
    key_ptr,  # [splits, B] fp32
    row_ptr,  # [splits, B] int32
    offs,
    B,
    splits,
    BLOCK: tl.constexpr,
):
    """The smallest (key, row) of each anchor over all splits; +inf where it has no candidate."""
    mask = offs < B
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    best_row = tl.full((BLOCK,), -1, tl.int32)
    for split in range(0, splits):
        at = offs.to(tl.int64) + tl.cast(split, tl.int64) * B
        key = tl.load(key_ptr + at, mask=mask, other=float("inf"))
        row = tl.load(row_ptr + at, mask=mask, other=-1)
        less = key < best  # splits ascend, so of equal keys the first has the lowest row
        best = tl.where(less, key, best)
        best_row = tl.where(less, row, best_row)
    return best, best_row


@triton.jit
def _forced(norm):
    """-inf for rows that are not finite, else 0: added to a key, it needs no mask per candidate."""
    return tl.where(norm < FINITE, 0.0, -float("inf"))


@triton.jit
def _improve(
    best,  # [m]
    best_row,  # [m]
    d2,  # [m, n], finite
    forced,  # [m, n], -inf where the distance is NaN, +inf where it is left out, else 0
    candidate,  # [m, n]
    floor,  # [m]; only keys above it count
    offs_n,  # [n], above all rows seen so far
    SIGN: tl.constexpr,
    FLOORED: tl.constexpr,
):
    key = forced + d2 if SIGN > 0 else forced - d2
    if FLOORED:
        beyond = tl.where(key == -float("inf"), key, float("inf"))
        key = tl.where(key > floor[:, None], key, beyond)
    key = tl.where(candidate, key, float("inf"))
    least = tl.min(key, 1)
    row = tl.min(tl.where(key == least[:, None], offs_n[None, :], _NO_ROW), 1)
    less = least < best
    return tl.where(less, least, best), tl.where(less, row, best_row)


@triton.jit
def _triplet_mine_kernel(
    x_ptr,  # [B, D], as `centre.centred` has them
    r_ptr,  # [M, D]
    given_x_ptr,  # likewise, not moved
    given_r_ptr,
    x_norm_ptr,  # [B] fp32, squared
    r_norm_ptr,  # [M] fp32, squared
    x_label_ptr,  # [B] int64
    r_label_ptr,  # [M] int64
    key_ptr,  # [2, splits, B] fp32: partial winners among positives and among negatives
    row_ptr,  # [2, splits, B] int32
    floor_key_ptr,  # [splits, B] fp32, [splits, B] int32: winners of the search that bounds this
    floor_row_ptr,
    exclude_ptr,  # [B] int64; with EXCLUDES
    B,
    M,
    D,
    splits,
    split_length,
    stride_xb,
    stride_xd,
    stride_rm,
    stride_rd,
    stride_gxb,  # of the rows given
    stride_gxd,
    stride_grm,
    stride_grd,
    IN_BATCH: tl.constexpr,
    EXCLUDES: tl.constexpr,
    POSITIVE: tl.constexpr,  # 1 looks for the nearest, -1 for the farthest, 0 not at all
    NEGATIVE: tl.constexpr,
    FLOOR: tl.constexpr,  # 0 without bound; else the sign that turns its keys into keys of this
    DIFFERENCES: tl.constexpr,  # of close rows, in place of products
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(1)
    # Past the end comes the last row again: as an anchor it is not stored, as a candidate it
    # changes nothing. So no mask of rows is kept, of which AMD devices hold few.
    offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = tl.minimum(offs, B - 1)
    x_norm = tl.load(x_norm_ptr + offs_m)
    x_label = tl.load(x_label_ptr + offs_m)
    x_forced = _forced(x_norm)
    if EXCLUDES:
        left_out = tl.load(exclude_ptr + offs_m).to(tl.int32)
    floor = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if FLOOR != 0:
        bound, _ = _winner(floor_key_ptr, floor_row_ptr, offs_m, B, splits, BLOCK_M)
        # without a bound nothing counts; beside NaN everything does
        floor = tl.where(bound == float("inf"), bound, FLOOR * bound)
        floor = tl.where(bound == -float("inf"), bound, floor)
    best_p = tl.full((BLOCK_M,), float("inf"), tl.float32)
    best_n = best_p
    row_p = tl.full((BLOCK_M,), -1, tl.int32)
    row_n = row_p
    # int64: a row number times a row stride passes 2**31 on large inputs
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xb
    first = split * split_length
    for n in range(first, tl.minimum(first + split_length, M), BLOCK_N):
        offs_n = tl.minimum(n + tl.arange(0, BLOCK_N), M - 1)
        r_ptrs = r_ptr + offs_n.to(tl.int64)[None, :] * stride_rm
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptrs + ks.to(tl.int64)[None, :] * stride_xd, mask=(ks < D)[None, :], other=0.0
            )
            r = tl.load(
                r_ptrs + ks.to(tl.int64)[:, None] * stride_rd, mask=(ks < D)[:, None], other=0.0
            )
            acc = dot(x, r, acc, PRECISION)
        r_norm = tl.load(r_norm_ptr + offs_n)
        d2 = x_norm[:, None] + r_norm[None, :] - 2.0 * acc
        if DIFFERENCES:
            # Below 0 for close rows. In numbers, relative to the tile: masks, and what masks are
            # made of below, would stay in registers meanwhile.
            near = d2 - close_share(x_ptr, D) * (x_norm[:, None] + r_norm[None, :])
            if IN_BATCH:
                apart = (offs_m - n).to(tl.float32)[:, None] - (offs_n - n).to(tl.float32)[None, :]
                near *= tl.minimum(tl.abs(apart), 1.0)
            if tl.min(near) < 0.0:  # products rank close rows by their rounding
                d2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                x_rows = given_x_ptr + offs_m.to(tl.int64) * stride_gxb
                r_rows = given_r_ptr + offs_n.to(tl.int64) * stride_grm
                for column in range(0, D):
                    step = tl.cast(column, tl.int64)
                    x_column = tl.load(x_rows + step * stride_gxd).to(tl.float32)
                    r_column = tl.load(r_rows + step * stride_grd).to(tl.float32)
                    difference = x_column[:, None] - r_column[None, :]
                    d2 += difference * difference
        d2 = tl.minimum(tl.where(d2 > 0.0, d2, 0.0), LARGEST)  # no NaN: what is forced says it
        forced = x_forced[:, None] + _forced(r_norm)[None, :]
        if EXCLUDES:  # a key of +inf is no candidate's; no mask is kept for it
            forced = tl.where(left_out[:, None] == offs_n[None, :], float("inf"), forced)
        same = x_label[:, None] == tl.load(r_label_ptr + offs_n)[None, :]
        if POSITIVE != 0:
            candidate = same
            if IN_BATCH:
                candidate = candidate & (offs_m[:, None] != offs_n[None, :])
            best_p, row_p = _improve(
                best_p, row_p, d2, forced, candidate, floor, offs_n, POSITIVE, FLOOR != 0
            )
        if NEGATIVE != 0:
            best_n, row_n = _improve(
                best_n, row_n, d2, forced, ~same, floor, offs_n, NEGATIVE, FLOOR != 0
            )
    at = split.to(tl.int64) * B + offs
    inside = offs < B
    if POSITIVE != 0:
        tl.store(key_ptr + at, best_p, mask=inside)
        tl.store(row_ptr + at, row_p, mask=inside)
    if NEGATIVE != 0:
        at += tl.cast(splits, tl.int64) * B
        tl.store(key_ptr + at, best_n, mask=inside)
        tl.store(row_ptr + at, row_n, mask=inside)


@triton.jit
def _distance(d2, nan, DISTANCE: tl.constexpr):
    d2 = tl.where(nan, float("nan"), d2)
    if DISTANCE == EUCLIDEAN:
        return tl.sqrt_rn(d2)
    elif DISTANCE == SQEUCLIDEAN:
        return d2
    else:
        return 0.5 * d2


@triton.jit
def _triplet_distances_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]
    key_ptr,  # [2, splits, B] fp32: partial winners
    row_ptr,  # [2, splits, B] int32
    positive_ptr,  # [B] int64
    negative_ptr,  # [B] int64
    d_ap_ptr,  # [B] fp32
    d_an_ptr,  # [B] fp32
    B,
    D,
    splits,
    stride_xb,
    stride_xd,
    stride_rm,
    stride_rd,
    DISTANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merges partial winners; distances from differences of rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < B
    side = tl.cast(splits, tl.int64) * B
    key_p, row_p = _winner(key_ptr, row_ptr, rows, B, splits, ROWS)
    key_n, row_n = _winner(key_ptr + side, row_ptr + side, rows, B, splits, ROWS)
    valid = (row_p >= 0) & (row_n >= 0)
    nan_p = valid & (key_p == -float("inf"))
    nan_n = valid & (key_n == -float("inf"))
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xb
    p_ptrs = r_ptr + row_p.to(tl.int64)[:, None] * stride_rm
    n_ptrs = r_ptr + row_n.to(tl.int64)[:, None] * stride_rm
    acc_p = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc_n = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column in range(0, D, COLUMNS):
        cols = (column + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        inside = valid[:, None] & (cols < D)
        x = tl.load(x_ptrs + cols * stride_xd, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(p_ptrs + cols * stride_rd, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(n_ptrs + cols * stride_rd, mask=inside, other=0.0).to(tl.float32)
        acc_p += (x - p) * (x - p)
        acc_n += (x - n) * (x - n)
    tl.store(positive_ptr + rows, tl.where(valid, row_p, -1).to(tl.int64), mask=mask)
    tl.store(negative_ptr + rows, tl.where(valid, row_n, -1).to(tl.int64), mask=mask)
    tl.store(d_ap_ptr + rows, _distance(tl.sum(acc_p, 1), nan_p, DISTANCE), mask=mask)
    tl.store(d_an_ptr + rows, _distance(tl.sum(acc_n, 1), nan_n, DISTANCE), mask=mask)


@triton.jit
def _slope(d, DISTANCE: tl.constexpr):
    """The factor w of d(distance)/dx = w (x - y); 0 at coincident points."""
    if DISTANCE == EUCLIDEAN:
        return tl.where(d == 0.0, 0.0, 1.0 / tl.where(d == 0.0, 1.0, d))
    elif DISTANCE == SQEUCLIDEAN:
        return tl.full(d.shape, 2.0, tl.float32)
    else:
        return tl.full(d.shape, 1.0, tl.float32)


@triton.jit
def _triplet_bwd_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]
    dout_ptr,  # [N, D]: gradient of x, or of r
    chosen_ptr,  # [2, B] int64, rows of r, or -1
    d_ptr,  # [2, B] fp32
    dd_ptr,  # [2, B] fp32
    order_ptr,  # [2 B] int64: entries of `chosen` in the order of the rows chosen
    begin_ptr,  # [M + 1] int64: where the entries of each row begin in `order`
    B,
    D,
    stride_xb,
    stride_xd,
    stride_rm,
    stride_rd,
    DISTANCE: tl.constexpr,
    ANCHOR: tl.constexpr,  # whether row i of dout is anchor i
    CHOSEN: tl.constexpr,  # whether it is row i of r
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    cols = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    mask = cols < D
    total = tl.zeros((COLUMNS,), tl.float32)
    if ANCHOR:
        x = tl.load(x_ptr + i * stride_xb + cols * stride_xd, mask=mask, other=0.0).to(tl.float32)
        # entries i and B + i: its positive and its negative
        sides = i + tl.arange(0, 2) * tl.cast(B, tl.int64)
        at = tl.load(chosen_ptr + sides)
        factor = tl.load(dd_ptr + sides) * _slope(tl.load(d_ptr + sides), DISTANCE)
        inside = (at >= 0)[:, None] & mask[None, :]
        r = tl.load(
            r_ptr + at[:, None] * stride_rm + cols[None, :] * stride_rd, mask=inside, other=0.0
        ).to(tl.float32)
        total += tl.sum(tl.where(inside, factor[:, None] * (x[None, :] - r), 0.0), 0)
    if CHOSEN:
        r_i = tl.load(r_ptr + i * stride_rm + cols * stride_rd, mask=mask, other=0.0).to(tl.float32)
        acc = tl.zeros((ENTRIES, COLUMNS), tl.float32)
        last = tl.load(begin_ptr + i + 1)
        for k in range(tl.load(begin_ptr + i), last, ENTRIES):
            ks = k + tl.arange(0, ENTRIES)
            some = ks < last
            entry = tl.load(order_ptr + ks, mask=some, other=0)
            d = tl.load(d_ptr + entry, mask=some, other=0.0)
            weight = tl.load(dd_ptr + entry, mask=some, other=0.0) * _slope(d, DISTANCE)
            anchor = tl.where(entry < B, entry, entry - B)
            contributes = some[:, None] & mask[None, :]
            y = tl.load(
                x_ptr + anchor[:, None] * stride_xb + cols[None, :] * stride_xd,
                mask=contributes,
                other=0.0,
            ).to(tl.float32)
            acc += tl.where(contributes, weight[:, None] * (r_i[None, :] - y), 0.0)
        total += tl.sum(acc, 0)
    tl.store(dout_ptr + i * D + cols, total.to(dout_ptr.dtype.element_ty), mask=mask)
