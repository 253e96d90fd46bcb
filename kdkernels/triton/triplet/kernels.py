# SPDX-License-Identifier: Apache-2.0
"""Kernels of triplet, forward.

Rows are contiguous, in the dtype that they were given in. What they are multiplied by, 1 or the
inverse of their norm, is applied to products and to elements, so 16-bit rows meet tensor cores.

A search keeps, per anchor, the smallest (key, row). The key of a candidate is its squared distance
to look for the nearest and minus that for the farthest; -inf where that distance is NaN, because
the candidate or the anchor is not finite; +inf means none. Splits of the references leave partial
winners that are merged in a fixed order.
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
    margin_loss,
    unmoved,
)
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.norms import row_statistics
from kdkernels.triton.common.product import product_tile

_NO_ROW = tl.constexpr(2**31 - 1)


@kernel(counts=("M",))
def _triplet_prepare_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]; not read with IN_BATCH
    scale_ptr,  # [B + M] fp32: what rows of x and then, unless IN_BATCH, of r are multiplied by
    norm_ptr,  # [B + M] fp32: their squared norms then
    unit_ptr,  # [B + M, D] fp32: the rows then, with UNIT
    key_ptr,  # [2, splits, B] fp32, with PAIRED: the positives are set
    row_ptr,  # [2, splits, B] int32, likewise
    B,
    M,
    D,
    splits,
    IN_BATCH: tl.constexpr,
    PAIRED: tl.constexpr,  # row i of r is the positive of row i of x
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    blocks = tl.cdiv(B, ROWS)
    if IN_BATCH or block < blocks:
        rows = block * ROWS + tl.arange(0, ROWS)
        scale, norm = row_statistics(x_ptr, rows, B, D, NORMALIZE, ROWS, COLUMNS)
        tl.store(scale_ptr + rows, scale, mask=rows < B)
        tl.store(norm_ptr + rows, norm, mask=rows < B)
        if UNIT:
            _store_unit(x_ptr, unit_ptr, rows, scale, B, D, ROWS, COLUMNS)
        if PAIRED:
            r_scale, r_norm = row_statistics(r_ptr, rows, B, D, NORMALIZE, ROWS, COLUMNS)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for column in range(0, D, COLUMNS):
                cols = column + tl.arange(0, COLUMNS)
                offs = rows.to(tl.int64)[:, None] * D + cols[None, :]
                mask = (rows < B)[:, None] & (cols < D)[None, :]
                x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                r = tl.load(r_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                difference = x * scale[:, None] - r * r_scale[:, None]
                acc += difference * difference
            # a pair at a distance of NaN is a pair all the same
            finite = (norm < FINITE) & (r_norm < FINITE)
            key = tl.where(finite, -tl.sum(acc, 1), -float("inf"))
            for split in range(0, splits):
                at = tl.cast(split, tl.int64) * B + rows
                tl.store(key_ptr + at, tl.where(split == 0, key, float("inf")), mask=rows < B)
                tl.store(row_ptr + at, tl.where(split == 0, rows, -1), mask=rows < B)
    else:
        rows = (block - blocks) * ROWS + tl.arange(0, ROWS)
        scale, norm = row_statistics(r_ptr, rows, M, D, NORMALIZE, ROWS, COLUMNS)
        tl.store(scale_ptr + B + rows, scale, mask=rows < M)
        tl.store(norm_ptr + B + rows, norm, mask=rows < M)
        if UNIT:
            out_ptr = unit_ptr + tl.cast(B, tl.int64) * D
            _store_unit(r_ptr, out_ptr, rows, scale, M, D, ROWS, COLUMNS)


@triton.jit
def _store_unit(x_ptr, out_ptr, rows, scale, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    for column in range(0, D, COLUMNS):
        cols = column + tl.arange(0, COLUMNS)
        offs = rows.to(tl.int64)[:, None] * D + cols[None, :]
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, x * scale[:, None], mask=mask)


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


@kernel(counts=("M", "split_length"))
def _triplet_mine_kernel(
    x_ptr,  # [B, D], rows of fp32 as `centre.centred` has them
    r_ptr,  # [M, D]
    given_x_ptr,  # likewise, not moved
    given_r_ptr,
    x_norm_ptr,  # [B] fp32, squared norms
    r_norm_ptr,  # [M] fp32
    scale_ptr,  # [B + M] fp32, or [B] with IN_BATCH: of both sides; with SCALED
    x_label_ptr,  # [B] int64
    r_label_ptr,  # [M] int64
    key_ptr,  # [2, splits, B] fp32: partial winners among positives and among negatives
    row_ptr,  # [2, splits, B] int32
    exclude_ptr,  # [B] int64; with EXCLUDES
    B,
    M,
    D,
    splits,
    split_length,
    IN_BATCH: tl.constexpr,
    EXCLUDES: tl.constexpr,
    SCALED: tl.constexpr,
    POSITIVE: tl.constexpr,  # 1 looks for the nearest, -1 for the farthest, 0 not at all
    NEGATIVE: tl.constexpr,
    BOUND: tl.constexpr,  # side whose winners bound this search, if FLOOR is not 0
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
    r_scale_ptr = scale_ptr
    if not IN_BATCH:
        r_scale_ptr += B
    x_norm = tl.load(x_norm_ptr + offs_m)
    x_label = tl.load(x_label_ptr + offs_m)
    if EXCLUDES:
        left_out = tl.load(exclude_ptr + offs_m).to(tl.int32)
    side = tl.cast(splits, tl.int64) * B
    floor = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if FLOOR != 0:
        bound, _ = _winner(
            key_ptr + BOUND * side, row_ptr + BOUND * side, offs_m, B, splits, BLOCK_M
        )
        # without a bound nothing counts; beside NaN everything does
        floor = tl.where(bound == float("inf"), bound, FLOOR * bound)
        floor = tl.where(bound == -float("inf"), bound, floor)
    best_p = tl.full((BLOCK_M,), float("inf"), tl.float32)
    best_n = best_p
    row_p = tl.full((BLOCK_M,), -1, tl.int32)
    row_n = row_p
    # int64: a row number times D passes 2**31 on large inputs
    x_rows = x_ptr + offs_m.to(tl.int64) * D
    first = split * split_length
    for n in range(first, tl.minimum(first + split_length, M), BLOCK_N):
        offs_n = tl.minimum(n + tl.arange(0, BLOCK_N), M - 1)
        r_rows = r_ptr + offs_n.to(tl.int64) * D
        acc = product_tile(x_rows, r_rows, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        if SCALED:  # one after the other: the product of two scales may leave the range
            acc = acc * tl.load(scale_ptr + offs_m)[:, None]
            acc = acc * tl.load(r_scale_ptr + offs_n)[None, :]
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
                given_x = unmoved(x_ptr, given_x_ptr) + offs_m.to(tl.int64) * D
                given_r = unmoved(r_ptr, given_r_ptr) + offs_n.to(tl.int64) * D
                for column in range(0, D):
                    x_column = tl.load(given_x + column).to(tl.float32)
                    r_column = tl.load(given_r + column).to(tl.float32)
                    if SCALED:
                        x_column *= tl.load(scale_ptr + offs_m)
                        r_column *= tl.load(r_scale_ptr + offs_n)
                    difference = x_column[:, None] - r_column[None, :]
                    d2 += difference * difference
        d2 = tl.minimum(tl.where(d2 > 0.0, d2, 0.0), LARGEST)  # no NaN: what is forced says it
        forced = _forced(x_norm)[:, None] + _forced(r_norm)[None, :]
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
        at += side
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


@kernel
def _triplet_distances_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]
    scale_ptr,  # [B + M] fp32, as above
    key_ptr,  # [2, splits, B] fp32: partial winners
    row_ptr,  # [2, splits, B] int32
    positive_ptr,  # [B] int64
    negative_ptr,  # [B] int64
    d_ap_ptr,  # [B] fp32
    d_an_ptr,  # [B] fp32
    loss_ptr,  # [B] fp32
    margin,
    B,
    D,
    splits,
    IN_BATCH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    SOFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merges partial winners; distances from differences of rows, and what they cost."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < B
    side = tl.cast(splits, tl.int64) * B
    key_p, row_p = _winner(key_ptr, row_ptr, rows, B, splits, ROWS)
    key_n, row_n = _winner(key_ptr + side, row_ptr + side, rows, B, splits, ROWS)
    valid = (row_p >= 0) & (row_n >= 0)
    nan_p = valid & (key_p == -float("inf"))
    nan_n = valid & (key_n == -float("inf"))
    r_scale_ptr = scale_ptr
    if not IN_BATCH:
        r_scale_ptr += B
    if NORMALIZE:
        x_scale = tl.load(scale_ptr + rows, mask=valid, other=0.0)
        p_scale = tl.load(r_scale_ptr + row_p, mask=valid, other=0.0)
        n_scale = tl.load(r_scale_ptr + row_n, mask=valid, other=0.0)
    acc_p = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc_n = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column in range(0, D, COLUMNS):
        cols = (column + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        inside = valid[:, None] & (cols < D)
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * D + cols, mask=inside, other=0.0)
        p = tl.load(r_ptr + row_p.to(tl.int64)[:, None] * D + cols, mask=inside, other=0.0)
        n = tl.load(r_ptr + row_n.to(tl.int64)[:, None] * D + cols, mask=inside, other=0.0)
        x, p, n = x.to(tl.float32), p.to(tl.float32), n.to(tl.float32)
        if NORMALIZE:
            x, p, n = x * x_scale[:, None], p * p_scale[:, None], n * n_scale[:, None]
        acc_p += (x - p) * (x - p)
        acc_n += (x - n) * (x - n)
    d_ap = _distance(tl.sum(acc_p, 1), nan_p, DISTANCE)
    d_an = _distance(tl.sum(acc_n, 1), nan_n, DISTANCE)
    loss, _ = margin_loss(d_ap - d_an + margin, SOFT)
    tl.store(positive_ptr + rows, tl.where(valid, row_p, -1).to(tl.int64), mask=mask)
    tl.store(negative_ptr + rows, tl.where(valid, row_n, -1).to(tl.int64), mask=mask)
    tl.store(d_ap_ptr + rows, d_ap, mask=mask)
    tl.store(d_an_ptr + rows, d_an, mask=mask)
    tl.store(loss_ptr + rows, tl.where(valid, loss, 0.0), mask=mask)


@kernel
def _triplet_sums_kernel(
    loss_ptr,  # [B] fp32
    positive_ptr,  # [B] int64
    total_ptr,  # [] fp32
    nonzero_ptr,  # [] int64
    valid_ptr,  # [] int64
    B,
    BLOCK: tl.constexpr,
):
    """One program, so the order of the sum depends on B alone."""
    total = tl.zeros((BLOCK,), tl.float64)
    nonzero = tl.zeros((BLOCK,), tl.int32)
    valid = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, B, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        loss = tl.load(loss_ptr + offs, mask=offs < B, other=0.0)
        positive = tl.load(positive_ptr + offs, mask=offs < B, other=-1)
        total += loss.to(tl.float64)
        nonzero += (loss > 0.0).to(tl.int32)
        valid += (positive >= 0).to(tl.int32)
    tl.store(total_ptr, tl.sum(total, 0).to(tl.float32))
    tl.store(nonzero_ptr, tl.sum(nonzero, 0).to(tl.int64))
    tl.store(valid_ptr, tl.sum(valid, 0).to(tl.int64))
