# SPDX-License-Identifier: Apache-2.0
"""Kernels of triplet, backward: the contributions to each row in a fixed order, and one program per
row of a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.distances import EUCLIDEAN, SQEUCLIDEAN, margin_loss
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.norms import EPS


@triton.jit
def _slope(d, DISTANCE: tl.constexpr):
    """The factor w of d(distance)/dx = w (x - y); 0 at coincident points."""
    if DISTANCE == EUCLIDEAN:
        return tl.where(d == 0.0, 0.0, 1.0 / tl.where(d == 0.0, 1.0, d))
    elif DISTANCE == SQEUCLIDEAN:
        return tl.full(d.shape, 2.0, tl.float32)
    else:
        return tl.full(d.shape, 1.0, tl.float32)


@kernel(counts=("M",))
def _triplet_entries_kernel(
    positive_ptr,  # [B] int64, rows of r, or -1
    negative_ptr,  # [B] int64
    entry_ptr,  # [2 B] int64: the row chosen times 2 B, plus the place here; M where there is none
    B,
    M,
    BLOCK: tl.constexpr,
):
    """Entries that sort into the order of the chosen rows, and for each into that of anchors."""
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    count = 2 * tl.cast(B, tl.int64)
    chosen = tl.load(positive_ptr + offs, mask=offs < B, other=-1)
    negative = tl.load(negative_ptr + (offs - B), mask=(offs >= B) & (offs < count), other=-1)
    chosen = tl.where(offs < B, chosen, negative)
    chosen = tl.where(chosen < 0, tl.cast(M, tl.int64), chosen)
    tl.store(entry_ptr + offs, chosen * count + offs, mask=offs < count)


@triton.jit
def _first_at_least(entry_ptr, count, least):
    """How many of so many ascending entries are below `least`."""
    low = tl.zeros_like(count)
    high = count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(entry_ptr + middle) < least
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _pull(
    dloss_ptr,  # [] or [B] fp32
    stride_dloss,
    d_ap_ptr,
    d_an_ptr,
    anchor,  # [n] int64
    some,  # [n]
    margin,
    SOFT: tl.constexpr,
):
    """(derivative of the loss by d_ap, d_ap, d_an) of anchors; that by d_an is minus it."""
    dloss = tl.load(dloss_ptr + anchor * stride_dloss, mask=some, other=0.0)
    d_ap = tl.load(d_ap_ptr + anchor, mask=some, other=0.0)
    d_an = tl.load(d_an_ptr + anchor, mask=some, other=0.0)
    u = d_ap - d_an + margin
    if SOFT:
        _, slope = margin_loss(u, SOFT)
        pull = dloss * slope
    else:  # where the hinge is 0, so is the gradient, whatever comes in
        pull = tl.where(u <= 0.0, 0.0, dloss)
    return tl.where(some, pull, 0.0), d_ap, d_an


@triton.jit
def _row_gradient(
    x_ptr, r_ptr, scale_ptr, dloss_ptr, positive_ptr, negative_ptr, d_ap_ptr, d_an_ptr, entry_ptr,
    margin, stride_dloss, i, cols, first, last, B, D,
    IN_BATCH: tl.constexpr, NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr, SOFT: tl.constexpr,
    ANCHOR: tl.constexpr, CHOSEN: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of the gradient of row i, with NORMALIZE of the row divided by its norm."""
    mask = cols < D
    r_scale_ptr = scale_ptr
    if not IN_BATCH:
        r_scale_ptr += B
    total = tl.zeros((COLUMNS,), tl.float32)
    if ANCHOR:
        x = tl.load(x_ptr + i * D + cols, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            x *= tl.load(scale_ptr + i)
        positive = tl.load(positive_ptr + i + tl.arange(0, 1))
        negative = tl.load(negative_ptr + i + tl.arange(0, 1))
        own, to_positive, to_negative = _pull(
            dloss_ptr, stride_dloss, d_ap_ptr, d_an_ptr, i + tl.arange(0, 1), positive >= 0, margin,
            SOFT,
        )  # fmt: skip
        inside = (positive >= 0)[:, None] & mask[None, :]
        p = tl.load(r_ptr + positive[:, None] * D + cols[None, :], mask=inside, other=0.0)
        n = tl.load(r_ptr + negative[:, None] * D + cols[None, :], mask=inside, other=0.0)
        p, n = p.to(tl.float32), n.to(tl.float32)
        if NORMALIZE:
            p *= tl.load(r_scale_ptr + positive, mask=positive >= 0, other=0.0)[:, None]
            n *= tl.load(r_scale_ptr + negative, mask=positive >= 0, other=0.0)[:, None]
        pull_p = (own * _slope(to_positive, DISTANCE))[:, None] * (x[None, :] - p)
        pull_n = (own * _slope(to_negative, DISTANCE))[:, None] * (x[None, :] - n)
        total += tl.sum(tl.where(inside, pull_p - pull_n, 0.0), 0)
    if CHOSEN:
        r = tl.load(r_ptr + i * D + cols, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            r *= tl.load(r_scale_ptr + i)
        acc = tl.zeros((ENTRIES, COLUMNS), tl.float32)
        count = 2 * tl.cast(B, tl.int64)
        for k in range(first, last, ENTRIES):
            ks = k + tl.arange(0, ENTRIES)
            some = ks < last
            entry = tl.load(entry_ptr + ks, mask=some, other=0) - i * count
            entry = tl.where(some, entry, 0)
            anchor = tl.where(entry < B, entry, entry - B)
            pull, d_ap, d_an = _pull(
                dloss_ptr, stride_dloss, d_ap_ptr, d_an_ptr, anchor, some, margin, SOFT
            )
            d = tl.where(entry < B, d_ap, d_an)
            weight = tl.where(entry < B, pull, -pull) * _slope(d, DISTANCE)
            contributes = some[:, None] & mask[None, :]
            y = tl.load(x_ptr + anchor[:, None] * D + cols[None, :], mask=contributes, other=0.0)
            y = y.to(tl.float32)
            if NORMALIZE:
                y *= tl.load(scale_ptr + anchor, mask=some, other=0.0)[:, None]
            acc += tl.where(contributes, weight[:, None] * (r[None, :] - y), 0.0)
        total += tl.sum(acc, 0)
    return total


@kernel(counts=("stride_dloss",))
def _triplet_bwd_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]
    scale_ptr,  # [B + M] fp32, or [B] with IN_BATCH: of both sides; with NORMALIZE
    dout_ptr,  # [N, D]: gradient of x, or of r
    dloss_ptr,  # [] or [B] fp32
    positive_ptr,  # [B] int64, rows of r, or -1
    negative_ptr,  # [B] int64
    d_ap_ptr,  # [B] fp32
    d_an_ptr,  # [B] fp32
    entry_ptr,  # [2 B] int64, ascending: those of the kernel above; with CHOSEN
    margin,
    stride_dloss,
    B,
    D,
    IN_BATCH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    SOFT: tl.constexpr,
    ANCHOR: tl.constexpr,  # whether row i of dout is anchor i
    CHOSEN: tl.constexpr,  # whether it is row i of r
    WHOLE: tl.constexpr,  # whether COLUMNS are all of D
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    count = 2 * tl.cast(B, tl.int64)
    first = tl.zeros_like(count)
    last = first
    if CHOSEN:
        first = _first_at_least(entry_ptr, count, i * count)
        last = _first_at_least(entry_ptr, count, (i + 1) * count)
    own_ptr = x_ptr if ANCHOR else r_ptr
    x2 = tl.zeros((), tl.float64)
    xv = tl.zeros((), tl.float64)
    if NORMALIZE and not WHOLE:
        for column in range(0, D, COLUMNS):
            cols = (column + tl.arange(0, COLUMNS)).to(tl.int64)
            v = _row_gradient(
                x_ptr, r_ptr, scale_ptr, dloss_ptr, positive_ptr, negative_ptr, d_ap_ptr, d_an_ptr,
                entry_ptr, margin, stride_dloss, i, cols, first, last, B, D, IN_BATCH, NORMALIZE,
                DISTANCE, SOFT, ANCHOR, CHOSEN, ENTRIES, COLUMNS,
            )  # fmt: skip
            x = tl.load(own_ptr + i * D + cols, mask=cols < D, other=0.0).to(tl.float64)
            x2 += tl.sum(x * x, 0)
            xv += tl.sum(x * v.to(tl.float64), 0)
    for column in range(0, D, COLUMNS):
        cols = (column + tl.arange(0, COLUMNS)).to(tl.int64)
        v = _row_gradient(
            x_ptr, r_ptr, scale_ptr, dloss_ptr, positive_ptr, negative_ptr, d_ap_ptr, d_an_ptr,
            entry_ptr, margin, stride_dloss, i, cols, first, last, B, D, IN_BATCH, NORMALIZE,
            DISTANCE, SOFT, ANCHOR, CHOSEN, ENTRIES, COLUMNS,
        )  # fmt: skip
        if NORMALIZE:
            x = tl.load(own_ptr + i * D + cols, mask=cols < D, other=0.0).to(tl.float64)
            wide = v.to(tl.float64)
            if WHOLE:
                x2 = tl.sum(x * x, 0)
                xv = tl.sum(x * wide, 0)
            # in fp64: the radial part can far exceed what remains; a clamped norm has none
            radial = tl.where(tl.sqrt(x2) < EPS, 0.0, xv / tl.where(x2 == 0.0, 1.0, x2))
            own = i if ANCHOR else i + B
            scale = tl.load(scale_ptr + own).to(tl.float64)
            v = ((wide - x * radial) * scale).to(tl.float32)
        tl.store(dout_ptr + i * D + cols, v.to(dout_ptr.dtype.element_ty), mask=cols < D)
