# SPDX-License-Identifier: Apache-2.0
"""Kernels of triplet_all: rows of distances become losses and weights.

References are in the order of their labels, so the positives of an anchor are one stretch of its
row of distances, `begin` to `end`; all else are negatives. One reference is left out: in batch the
anchor itself, else the one that `exclude` names. Nothing counts past an end: there a positive is at
distance -inf and a negative at +inf, so no triplet with it has a loss. So too where the anchor
lacks one of the two: it is left without both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.distances import gradient_weight, margin_loss
from kdkernels.triton.common.jit import kernel

_NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def _stretch(
    begin_ptr, end_ptr, exclude_ptr, anchor, M, IN_BATCH: tl.constexpr, EXCLUDES: tl.constexpr
):
    """(begin, end, the reference left out or -1, number of positives, of negatives)."""
    begin = tl.load(begin_ptr + anchor).to(tl.int32)
    end = tl.load(end_ptr + anchor).to(tl.int32)
    positives = end - begin
    negatives = M - positives
    out = anchor
    if IN_BATCH:
        positives -= 1
    elif EXCLUDES:
        out = tl.load(exclude_ptr + anchor).to(tl.int32)
        is_positive = (out >= begin) & (out < end)
        positives -= is_positive.to(tl.int32)
        negatives -= ((out >= 0) & ~is_positive).to(tl.int32)
    return begin, end, out, positives, negatives


@triton.jit
def _positives(row_ptr, offs, end, out, kept, LEAVES_OUT: tl.constexpr):
    """(distances; which of them are of positives)."""
    some = (offs < end) & kept
    if LEAVES_OUT:
        some = some & (offs != out)
    return tl.load(row_ptr + offs, mask=some, other=-float("inf")), some


@triton.jit
def _negatives(row_ptr, offs, begin, end, out, kept, M, EXCLUDES: tl.constexpr):
    """(distances; which of them are of negatives)."""
    some = ((offs < begin) | (offs >= end)) & (offs < M) & kept
    if EXCLUDES:  # in batch an anchor is no negative of itself anyway
        some = some & (offs != out)
    return tl.load(row_ptr + offs, mask=some, other=float("inf")), some


@kernel
def _triplet_all_positives_kernel(
    d_ptr,  # [rows, M] fp32: distances of the anchors from row `first` on
    w_ptr,  # [rows, M] fp32 weights; written for positives and the anchor itself
    chosen_ptr,  # [rows, M] int32: the negative of each positive, or -1; with SEMIHARD
    begin_ptr,  # [B] int64
    end_ptr,  # [B] int64
    exclude_ptr,  # [B] int64; with EXCLUDES
    order_ptr,  # [M] int64: original row of each reference
    place_ptr,  # [M] int64: reference of each original row
    loss_ptr,  # [B] fp64
    nonzero_ptr,  # [B] int64
    valid_ptr,  # [B] int64
    margin,
    first,
    M,
    IN_BATCH: tl.constexpr,
    EXCLUDES: tl.constexpr,
    SEMIHARD: tl.constexpr,
    SOFT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DISTANCE: tl.constexpr,
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * M
    anchor = first + tl.program_id(0)
    begin, end, out, positives, negatives = _stretch(
        begin_ptr, end_ptr, exclude_ptr, anchor, M, IN_BATCH, EXCLUDES
    )
    kept = (positives > 0) & (negatives > 0)
    if SEMIHARD:  # the farthest negative; equal ones go to the lowest original row
        far = tl.full((NEGATIVES,), -float("inf"), tl.float32)
        far_row = tl.full((NEGATIVES,), _NO_ROW, tl.int32)
        for n in range(0, M, NEGATIVES):
            offs_n = n + tl.arange(0, NEGATIVES)
            d_n, some_n = _negatives(d_ptr + row, offs_n, begin, end, out, kept, M, EXCLUDES)
            row_n = tl.load(order_ptr + offs_n, mask=some_n, other=_NO_ROW).to(tl.int32)
            better = some_n & ((d_n > far) | ((d_n == far) & (row_n < far_row)))
            far = tl.where(better, d_n, far)
            far_row = tl.where(better, row_n, far_row)
        farthest = tl.max(far, 0)
        farthest_row = tl.min(tl.where(far == farthest, far_row, _NO_ROW), 0)
    losses = tl.full((), 0.0, tl.float64)
    nonzero = tl.full((), 0, tl.int64)
    for p in range(begin, end, POSITIVES):
        offs_p = p + tl.arange(0, POSITIVES)
        d_p, some_p = _positives(d_ptr + row, offs_p, end, out, kept, IN_BATCH or EXCLUDES)
        if SEMIHARD:
            near = tl.full((POSITIVES, NEGATIVES), float("inf"), tl.float32)
            near_row = tl.full((POSITIVES, NEGATIVES), _NO_ROW, tl.int32)
            for n in range(0, M, NEGATIVES):
                offs_n = n + tl.arange(0, NEGATIVES)
                d_n, some_n = _negatives(d_ptr + row, offs_n, begin, end, out, kept, M, EXCLUDES)
                row_n = tl.load(order_ptr + offs_n, mask=some_n, other=_NO_ROW).to(tl.int32)
                key = tl.where(d_n == d_n, d_n, -float("inf"))  # NaN comes before all
                # beside NaN everything is beyond, and NaN is beyond everything
                key = tl.where(d_n[None, :] <= d_p[:, None], float("inf"), key[None, :])
                better = (key < near) | ((key == near) & (row_n[None, :] < near_row))
                near = tl.where(better, key, near)
                near_row = tl.where(better, row_n[None, :], near_row)
            nearest = tl.min(near, 1)
            nearest_row = tl.min(tl.where(near == nearest[:, None], near_row, _NO_ROW), 1)
            d_n = tl.where(nearest < float("inf"), nearest, farthest)
            d_n = tl.where(d_n == -float("inf"), float("nan"), d_n)
            loss, slope = margin_loss(tl.where(some_p, d_p - d_n + margin, -float("inf")), SOFT)
            count = (loss > 0.0).to(tl.int32)
            if WEIGHTS:
                row_n = tl.where(nearest < float("inf"), nearest_row, farthest_row)
                place = tl.load(place_ptr + row_n, mask=some_p, other=-1).to(tl.int32)
                tl.store(chosen_ptr + row + offs_p, place, mask=offs_p < end)
        else:
            loss_pn = tl.zeros((POSITIVES, NEGATIVES), tl.float32)
            slope_pn = tl.zeros((POSITIVES, NEGATIVES), tl.float32)
            count_pn = tl.zeros((POSITIVES, NEGATIVES), tl.int32)
            for n in range(0, M, NEGATIVES):
                offs_n = n + tl.arange(0, NEGATIVES)
                d_n, _ = _negatives(d_ptr + row, offs_n, begin, end, out, kept, M, EXCLUDES)
                loss, slope = margin_loss(d_p[:, None] - d_n[None, :] + margin, SOFT)
                loss_pn += loss
                slope_pn += slope
                count_pn += (loss > 0.0).to(tl.int32)
            loss, slope, count = tl.sum(loss_pn, 1), tl.sum(slope_pn, 1), tl.sum(count_pn, 1)
        losses += tl.sum(loss.to(tl.float64), 0)
        nonzero += tl.sum(count, 0).to(tl.int64)
        if WEIGHTS:
            slope = tl.where(loss == loss, slope, loss)
            w = tl.where(some_p, gradient_weight(slope, d_p, DISTANCE), 0.0)
            tl.store(w_ptr + row + offs_p, w, mask=offs_p < end)
    tl.store(loss_ptr + anchor, losses)
    tl.store(nonzero_ptr + anchor, nonzero)
    compared = tl.minimum(negatives, 1) if SEMIHARD else negatives
    tl.store(valid_ptr + anchor, positives.to(tl.int64) * compared.to(tl.int64))


@kernel
def _triplet_all_negatives_kernel(
    d_ptr,  # [rows, M] fp32: distances of the anchors from row `first` on
    w_ptr,  # [rows, M] fp32 weights; written for negatives
    chosen_ptr,  # [rows, M] int32: the negative of each positive, or -1; with SEMIHARD
    begin_ptr,  # [B] int64
    end_ptr,  # [B] int64
    exclude_ptr,  # [B] int64; with EXCLUDES
    margin,
    first,
    M,
    IN_BATCH: tl.constexpr,
    EXCLUDES: tl.constexpr,
    SEMIHARD: tl.constexpr,
    SOFT: tl.constexpr,
    DISTANCE: tl.constexpr,
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * M
    anchor = first + tl.program_id(0)
    begin, end, out, positives, negatives = _stretch(
        begin_ptr, end_ptr, exclude_ptr, anchor, M, IN_BATCH, EXCLUDES
    )
    kept = (positives > 0) & (negatives > 0)
    offs_n = tl.program_id(1) * NEGATIVES + tl.arange(0, NEGATIVES)
    d_n, some_n = _negatives(d_ptr + row, offs_n, begin, end, out, kept, M, EXCLUDES)
    slope_pn = tl.zeros((POSITIVES, NEGATIVES), tl.float32)
    for p in range(begin, end, POSITIVES):
        offs_p = p + tl.arange(0, POSITIVES)
        d_p, some_p = _positives(d_ptr + row, offs_p, end, out, kept, IN_BATCH or EXCLUDES)
        _, slope = margin_loss(d_p[:, None] - d_n[None, :] + margin, SOFT)
        if SEMIHARD:
            chosen = tl.load(chosen_ptr + row + offs_p, mask=some_p, other=-1)
            slope = tl.where(chosen[:, None] == offs_n[None, :], slope, 0.0)
        slope_pn += slope
    w = tl.where(some_n, gradient_weight(-tl.sum(slope_pn, 0), d_n, DISTANCE), 0.0)
    w = tl.where(d_n == d_n, w, d_n)
    past = (offs_n < begin) | (offs_n >= end)
    tl.store(w_ptr + row + offs_n, w, mask=past & (offs_n < M))
