# SPDX-License-Identifier: Apache-2.0
"""Kernels of relational_kl.

A tile of logits becomes weights relative to the largest of each row in the tile, and its sums. When
the tiles of a row are merged, each gets one factor per side, and a second product reads the weights
times their factors while they are in the L2 cache: three products in all, since both sides' weights
meet before it. Sums are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.dots import dot, dot_weights
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.product import number_that_count, split_tile, store_split
from kdkernels.triton.relational_kl.row_kernels import LSE_S, LSE_T, OWN_S, OWN_T, SCALE_S, SCALE_T

_MAX_S = tl.constexpr(0)  # places of the statistics of a tile
_SUM_S = tl.constexpr(1)
_POSITIVE = tl.constexpr(2)  # without a teacher: logit of the positive key, 0 in other tiles
_MAX_T = tl.constexpr(2)
_SUM_T = tl.constexpr(3)
_MEAN = tl.constexpr(4)
# In place of a logit that does not count: no weight, and finite, so that 0 times it is 0.
_LEAST = tl.constexpr(-3e38)


@triton.jit
def logits(
    x_ptr,  # [B, D] contiguous
    keys_ptr,  # [K, D] contiguous, of the dtype of x
    x_scales_ptr,  # [B] fp32
    key_scales_ptr,  # [K] fp32, or None
    offs_m,
    offs_n,
    B,
    K,
    D,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x keys^T times the scales of both, fp32: products of 16-bit operands are exact."""
    # int64: a row number times a row stride passes 2**31 on large inputs
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * D
    keys_ptrs = keys_ptr + offs_n.to(tl.int64)[None, :] * D
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_K):
        ds = d + tl.arange(0, BLOCK_K)
        mask_d = ds < D
        x = tl.load(
            x_ptrs + ds[None, :],
            mask=(offs_m < B)[:, None] & mask_d[None, :],
            other=0.0,
        )
        keys = tl.load(
            keys_ptrs + ds[:, None],
            mask=(offs_n < K)[None, :] & mask_d[:, None],
            other=0.0,
        )
        acc = dot(x, keys, acc, PRECISION)
    # after the loop, or registers would hold them through it
    acc *= tl.load(x_scales_ptr + offs_m, mask=offs_m < B, other=0.0)[:, None]
    if key_scales_ptr is not None:
        acc *= tl.load(key_scales_ptr + offs_n, mask=offs_n < K, other=0.0)[None, :]
    return acc


@triton.jit
def _below_largest(a):
    """Logits less the largest of each row, and that: -inf where none of them counts."""
    most = tl.max(a, 1)
    none = most <= _LEAST
    return a - tl.where(none, 0.0, most)[:, None], tl.where(none, -float("inf"), most)


@kernel
def _relational_kl_weights_kernel(
    x_ptr,  # [B, D] contiguous
    y_ptr,  # [B, E] contiguous, or None
    keys_ptr,  # [K, D] contiguous
    teacher_keys_ptr,  # [K, E] contiguous, or None where both sides have the same keys
    key_scales_ptr,  # [1 or 2, K] fp32, or None
    numbers_ptr,  # [7, B] fp32
    positives_ptr,  # [B] int64, or None
    exclude_ptr,  # [B] int64, [B, K] bool with MASK, or None
    num_keys_ptr,  # [] int64, or None
    weights_ptr,  # [1 or 2, rows, K], or None
    stats_ptr,  # [5, tiles of K, rows] fp32; [3, tiles of K, rows] without a teacher
    first,  # row
    rows,  # from there on
    B,
    K,
    D,
    E,
    MASK: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(K, BLOCK_N)
    i, j = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    local_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = local_m < rows
    offs_m = first + local_m
    offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    counting = number_that_count(num_keys_ptr, K, num_keys_ptr is not None)
    row_stats = stats_ptr + tl.cast(j, tl.int64) * rows + local_m
    step = tl.cast(tiles_n, tl.int64) * rows
    last, B64 = first + rows, tl.cast(B, tl.int64)
    a = logits(
        x_ptr, keys_ptr, numbers_ptr + SCALE_S * B64, key_scales_ptr, offs_m, offs_n, last,
        counting, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if positives_ptr is not None:
        positive = tl.load(positives_ptr + offs_m, mask=mask_m, other=-1)
        at = tl.sum(tl.where(offs_n[None, :] == positive[:, None], a, 0.0), 1)
        tl.store(row_stats + _POSITIVE * step, at, mask=mask_m)
    counts = (offs_n < counting)[None, :]
    if exclude_ptr is not None:
        if MASK:
            at = exclude_ptr + offs_m.to(tl.int64)[:, None] * K + offs_n[None, :]
            counts &= tl.load(at, mask=mask_m[:, None] & (offs_n < K)[None, :], other=1) == 0
        else:
            exclude = tl.load(exclude_ptr + offs_m, mask=mask_m, other=-1)
            counts &= offs_n[None, :] != exclude[:, None]
    a, max_s = _below_largest(tl.where(counts, a, _LEAST))
    ws = tl.exp(a)
    tl.store(row_stats + _MAX_S * step, max_s, mask=mask_m)
    tl.store(row_stats + _SUM_S * step, tl.sum(ws, 1), mask=mask_m)
    if y_ptr is not None:
        scales_ptr = numbers_ptr + SCALE_T * B64
        if teacher_keys_ptr is None:
            b = logits(
                y_ptr, keys_ptr, scales_ptr, key_scales_ptr, offs_m, offs_n, last, counting, D,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            b = logits(
                y_ptr, teacher_keys_ptr, scales_ptr, second_bank(key_scales_ptr, K), offs_m, offs_n,
                last, counting, E, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        # a tells what does not count: predicates would be held through the product
        b, max_t = _below_largest(tl.where(a < 0.5 * _LEAST, _LEAST, b))
        wt = tl.exp(b)
        c = b - a if ENTROPY else -a
        tl.store(row_stats + _MAX_T * step, max_t, mask=mask_m)
        tl.store(row_stats + _SUM_T * step, tl.sum(wt, 1), mask=mask_m)
        tl.store(row_stats + _MEAN * step, tl.sum(wt * c, 1), mask=mask_m)
    if weights_ptr is not None:  # last: addresses would be held through the product, too
        at = weights_ptr + local_m.to(tl.int64)[:, None] * K + offs_n[None, :]
        stored = mask_m[:, None] & (offs_n < counting)[None, :]
        tl.store(at, ws.to(weights_ptr.dtype.element_ty), mask=stored)
        if y_ptr is not None:
            at += tl.cast(rows, tl.int64) * K
            tl.store(at, wt.to(weights_ptr.dtype.element_ty), mask=stored)


@triton.jit
def second_bank(key_scales_ptr, K):
    """Scales of the second bank, if keys have scales."""
    if key_scales_ptr is None:
        return None
    else:
        return key_scales_ptr + K


@triton.jit
def _relative(max_ptr, sum_ptr, mask, most):
    """(weight of each tile's sums beside the tile of the largest maximum, sum, maximum less the
    largest); 0 where nothing in the tile counts."""
    top = tl.load(max_ptr, mask=mask, other=-float("inf"))
    total = tl.load(sum_ptr, mask=mask, other=0.0)
    below = tl.where(top == -float("inf"), 0.0, top - most[:, None])
    return tl.where(top == -float("inf"), 0.0, tl.exp(below)), total, below


@triton.jit
def _raised(most, max_ptr, mask):
    """The larger of `most` and the maxima of tiles, of each row; NaN shows in the sums."""
    top = tl.max(tl.load(max_ptr, mask=mask, other=-float("inf")), 1)
    return tl.where(top > most, top, most)


@kernel
def _relational_kl_merge_kernel(
    stats_ptr,  # [5 or 3, tiles, rows] fp32; with FACTORS maxima become factors of weights
    positives_ptr,  # [B] int64, or None
    exclude_ptr,  # [B] int64, or None
    num_keys_ptr,  # [] int64, or None
    numbers_ptr,  # [7, B] fp32
    loss_ptr,  # [B] fp32
    first,
    rows,
    B,
    K,
    tiles,
    TEACHER: tl.constexpr,
    OWN: tl.constexpr,
    MASK: tl.constexpr,
    ENTROPY: tl.constexpr,
    FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums of all tiles of a row, ROWS x TILES of them at a time."""
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = local < rows
    offs = first + local
    step = tl.cast(tiles, tl.int64) * rows
    of_row = numbers_ptr + offs.to(tl.int64)
    B64 = tl.cast(B, tl.int64)
    counting = number_that_count(num_keys_ptr, K, num_keys_ptr is not None)
    most_s = tl.full((ROWS,), -float("inf"), tl.float32)
    most_t = tl.full((ROWS,), -float("inf"), tl.float32)
    if OWN:
        own_s = tl.load(of_row + OWN_S * B64, mask=mask, other=0.0)
        most_s = own_s
        if TEACHER:
            own_t = tl.load(of_row + OWN_T * B64, mask=mask, other=0.0)
            most_t = own_t
    for j in range(0, tiles, TILES):
        ts = j + tl.arange(0, TILES)
        read = mask[:, None] & (ts < tiles)[None, :]
        at = stats_ptr + ts.to(tl.int64)[None, :] * rows + local[:, None]
        most_s = _raised(most_s, at + _MAX_S * step, read)
        if TEACHER:
            most_t = _raised(most_t, at + _MAX_T * step, read)
    sum_s = tl.zeros((ROWS,), tl.float32)
    sum_t = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    if OWN:
        sum_s = tl.exp(own_s - most_s)
        if TEACHER:
            sum_t = tl.exp(own_t - most_t)
            c = most_s - own_s
            mean = sum_t * (own_t - most_t + c if ENTROPY else c)
        elif positives_ptr is None:
            mean = -own_s
    for j in range(0, tiles, TILES):
        ts = j + tl.arange(0, TILES)
        read = mask[:, None] & (ts < tiles)[None, :]
        at = stats_ptr + ts.to(tl.int64)[None, :] * rows + local[:, None]
        w, total, below_s = _relative(at + _MAX_S * step, at + _SUM_S * step, read, most_s)
        sum_s += tl.sum(w * total, 1)
        if TEACHER:
            w, total, below_t = _relative(at + _MAX_T * step, at + _SUM_T * step, read, most_t)
            sum_t += tl.sum(w * total, 1)
            shift = below_t - below_s if ENTROPY else -below_s
            of_tile = tl.load(at + _MEAN * step, mask=read, other=0.0) + shift * total
            mean += tl.sum(w * of_tile, 1)
        elif positives_ptr is not None:
            mean -= tl.sum(tl.load(at + _POSITIVE * step, mask=read, other=0.0), 1)
    no_key = local >= rows  # or none is left
    if positives_ptr is None and not OWN:
        no_key = no_key | (counting <= 0)
        if exclude_ptr is not None:
            if MASK:
                no_key = no_key | (most_s == -float("inf"))
            else:
                exclude = tl.load(exclude_ptr + offs, mask=mask, other=-1)
                no_key = no_key | ((exclude == 0) & (counting == 1))
    sum_s = tl.where(no_key, 1.0, sum_s)
    log_s = tl.log(sum_s)
    if TEACHER:
        sum_t = tl.where(no_key, 1.0, sum_t)
        # both maxima have cancelled: c is relative to them
        loss = mean / sum_t + log_s
        if ENTROPY:
            loss -= tl.log(sum_t)
        tl.store(of_row + LSE_T * B64, most_t + tl.log(sum_t), mask=mask)
    else:
        loss = mean + most_s + log_s
    if positives_ptr is not None:
        positive = tl.load(positives_ptr + offs, mask=mask, other=0)
        loss = tl.where((positive >= 0) & (positive < counting), loss, float("nan"))
    tl.store(loss_ptr + offs, tl.where(no_key, 0.0, loss), mask=mask)
    tl.store(of_row + LSE_S * B64, most_s + log_s, mask=mask)
    if FACTORS:
        for j in range(0, tiles, TILES):
            ts = j + tl.arange(0, TILES)
            read = mask[:, None] & (ts < tiles)[None, :]
            at = stats_ptr + ts.to(tl.int64)[None, :] * rows + local[:, None]
            w, _, _ = _relative(at + _MAX_S * step, at + _SUM_S * step, read, most_s)
            w = tl.where(no_key[:, None], 0.0, w / sum_s[:, None])
            tl.store(at + _MAX_S * step, w, mask=read)
            if TEACHER:
                w, _, _ = _relative(at + _MAX_T * step, at + _SUM_T * step, read, most_t)
                w = tl.where(no_key[:, None], 0.0, w / sum_t[:, None])
                tl.store(at + _MAX_T * step, w, mask=read)


@kernel
def _relational_kl_fwd_kernel_product(
    weights_ptr,  # [1 or 2, rows, K]
    stats_ptr,  # [5 or 3, tiles, rows] fp32: factors in the maxima's places
    keys_ptr,  # [K, D] contiguous
    key_scales_ptr,  # [K] fp32, or None
    positives_ptr,  # [B] int64, or None
    num_keys_ptr,  # [] int64, or None
    out_ptr,  # [B, D] fp32, or [splits, rows, D]
    first,
    rows,
    K,
    D,
    split_k,  # keys of a split; a multiple of TILE
    TEACHER: tl.constexpr,
    SPLIT: tl.constexpr,  # whether there are several splits
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,  # keys of a tile of weights; a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Student's less teacher's softmax, times the scaled keys, less the positive one."""
    local_m, offs_n, split = split_tile(rows, BLOCK_M, BLOCK_N)
    mask_m, mask_n = local_m < rows, offs_n < D
    step = tl.cast(tl.cdiv(K, TILE), tl.int64) * rows
    w_rows = local_m.to(tl.int64)[:, None] * K
    k_first = split * split_k
    counting = number_that_count(num_keys_ptr, K, num_keys_ptr is not None)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k_first, tl.minimum(k_first + split_k, counting), BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask_k = ks < counting
        read = mask_m[:, None] & mask_k[None, :]
        row = stats_ptr + tl.cast(k // TILE, tl.int64) * rows + local_m
        factor = tl.load(row + _MAX_S * step, mask=mask_m, other=0.0)
        at = weights_ptr + w_rows + ks[None, :]
        g = factor[:, None] * tl.load(at, mask=read, other=0.0).to(tl.float32)
        if TEACHER:
            factor = tl.load(row + _MAX_T * step, mask=mask_m, other=0.0)
            wt = tl.load(at + tl.cast(rows, tl.int64) * K, mask=read, other=0.0)
            g -= factor[:, None] * wt.to(tl.float32)
        if key_scales_ptr is not None:
            g *= tl.load(key_scales_ptr + ks, mask=mask_k, other=0.0)[None, :]
        at = keys_ptr + ks.to(tl.int64)[:, None] * D + offs_n[None, :]
        keys = tl.load(at, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot_weights(g, keys, acc, PRECISION)
    if positives_ptr is not None:
        mine = mask_m & (split == 0)
        positive = tl.load(positives_ptr + first + local_m, mask=mine, other=0)
        counts = (positive >= 0) & (positive < counting)
        scale = tl.where(counts, 1.0, float("nan"))  # a positive that does not count
        if key_scales_ptr is not None:
            scale *= tl.load(key_scales_ptr + positive, mask=mine & counts, other=1.0)
        at = keys_ptr + tl.where(counts, positive, 0)[:, None] * D + offs_n[None, :]
        named = tl.load(at, mask=mine[:, None] & mask_n[None, :], other=0.0)
        acc -= tl.where(mine[:, None], scale[:, None] * named.to(tl.float32), 0.0)
    if SPLIT:
        store_split(out_ptr, acc, split, local_m, offs_n, rows, D)
    else:
        store_split(out_ptr + tl.cast(first, tl.int64) * D, acc, split, local_m, offs_n, rows, D)
