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

from kdkernels.triton.common.dots import dot_split, dot_weights
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.product import number_that_count, split_tile, store_split

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
    x_ptr,  # [B, D] fp32, contiguous
    keys_ptr,  # [K, D]
    scale_ptr,  # [K] fp32, or unused
    offs_m,
    offs_n,
    B,
    K,
    D,
    stride_kn,
    stride_kd,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x (scale keys)^T of a tile, fp32."""
    # int64: a row number times a row stride passes 2**31 on large inputs
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * D
    keys_ptrs = keys_ptr + offs_n.to(tl.int64)[None, :] * stride_kn
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
            keys_ptrs + ds.to(tl.int64)[:, None] * stride_kd,
            mask=(offs_n < K)[None, :] & mask_d[:, None],
            other=0.0,
        )
        acc = dot_split(x, keys, acc, PRECISION)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + offs_n, mask=offs_n < K, other=0.0)[None, :]
    return acc


@triton.jit
def _below_largest(a):
    """Logits less the largest of each row, and that: -inf where none of them counts."""
    most = tl.max(a, 1)
    none = most <= _LEAST
    return a - tl.where(none, 0.0, most)[:, None], tl.where(none, -float("inf"), most)


@kernel
def _relational_kl_weights_kernel(
    x_ptr,  # [B, D] fp32, contiguous
    y_ptr,  # [B, E] fp32, contiguous, or unused
    keys_ptr,  # [K, D]
    teacher_keys_ptr,  # [K, E], or unused
    scale_ptr,  # [K] fp32, or unused
    teacher_scale_ptr,  # [K] fp32, or unused
    positives_ptr,  # [B] int64, or unused
    exclude_ptr,  # [B] int64, [B, K] bool with MASK, or unused
    num_keys_ptr,  # [] int64, or unused
    ws_ptr,  # [B, K], or unused
    wt_ptr,  # [B, K], or unused
    stats_ptr,  # [5, tiles of K, B] fp32; [3, tiles of K, B] without a teacher
    B,
    K,
    D,
    E,
    stride_kn,
    stride_kd,
    stride_rn,
    stride_rd,
    TEACHER: tl.constexpr,
    POSITIVES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    MASK: tl.constexpr,
    HAS_NUM_KEYS: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(B, BLOCK_M), tl.cdiv(K, BLOCK_N)
    i, j = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    offs_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < B
    counting = number_that_count(num_keys_ptr, K, HAS_NUM_KEYS)
    row_stats = stats_ptr + tl.cast(j, tl.int64) * B + offs_m
    step = tl.cast(tiles_n, tl.int64) * B
    a = logits(
        x_ptr, keys_ptr, scale_ptr, offs_m, offs_n, B, counting, D, stride_kn, stride_kd,
        HAS_SCALE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if POSITIVES:
        positive = tl.load(positives_ptr + offs_m, mask=mask_m, other=-1)
        at = tl.sum(tl.where(offs_n[None, :] == positive[:, None], a, 0.0), 1)
        tl.store(row_stats + _POSITIVE * step, at, mask=mask_m)
    counts = (offs_n < counting)[None, :]
    if MASK:
        at = exclude_ptr + offs_m.to(tl.int64)[:, None] * K + offs_n[None, :]
        counts &= tl.load(at, mask=mask_m[:, None] & (offs_n < K)[None, :], other=1) == 0
    elif HAS_EXCLUDE:
        exclude = tl.load(exclude_ptr + offs_m, mask=mask_m, other=-1)
        counts &= offs_n[None, :] != exclude[:, None]
    a, max_s = _below_largest(tl.where(counts, a, _LEAST))
    ws = tl.exp(a)
    tl.store(row_stats + _MAX_S * step, max_s, mask=mask_m)
    tl.store(row_stats + _SUM_S * step, tl.sum(ws, 1), mask=mask_m)
    if TEACHER:
        b = logits(
            y_ptr, teacher_keys_ptr, teacher_scale_ptr, offs_m, offs_n, B, counting, E,
            stride_rn, stride_rd, HAS_SCALE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        # a tells what does not count: predicates would be held through the product
        b, max_t = _below_largest(tl.where(a < 0.5 * _LEAST, _LEAST, b))
        wt = tl.exp(b)
        c = b - a if ENTROPY else -a
        tl.store(row_stats + _MAX_T * step, max_t, mask=mask_m)
        tl.store(row_stats + _SUM_T * step, tl.sum(wt, 1), mask=mask_m)
        tl.store(row_stats + _MEAN * step, tl.sum(wt * c, 1), mask=mask_m)
    if STORE:  # last: addresses would be held through the product, too
        offs_w = offs_m.to(tl.int64)[:, None] * K + offs_n[None, :]
        stored = mask_m[:, None] & (offs_n < counting)[None, :]
        tl.store(ws_ptr + offs_w, ws.to(ws_ptr.dtype.element_ty), mask=stored)
        if TEACHER:
            tl.store(wt_ptr + offs_w, wt.to(wt_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _relative(max_ptr, sum_ptr, mask, most):
    """(weight of a tile's sums beside the tile of the largest maximum, sum, maximum less the
    largest); 0 where nothing in the tile counts."""
    top = tl.load(max_ptr, mask=mask, other=-float("inf"))
    total = tl.load(sum_ptr, mask=mask, other=0.0)
    below = tl.where(top == -float("inf"), 0.0, top - most)
    return tl.where(top == -float("inf"), 0.0, tl.exp(below)), total, below


@kernel
def _relational_kl_merge_kernel(
    stats_ptr,  # [5 or 3, tiles, B] fp32; with FACTORS maxima become factors of weights
    positives_ptr,  # [B] int64, or unused
    exclude_ptr,  # [B] int64, or unused
    num_keys_ptr,  # [] int64, or unused
    own_s_ptr,  # [B] fp32, or unused
    own_t_ptr,  # [B] fp32, or unused
    loss_ptr,  # [B] fp32
    lse_s_ptr,  # [B] fp32
    lse_t_ptr,  # [B] fp32
    B,
    K,
    tiles,
    TEACHER: tl.constexpr,
    POSITIVES: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    MASK: tl.constexpr,
    HAS_NUM_KEYS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    ENTROPY: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < B
    step = tl.cast(tiles, tl.int64) * B
    counting = number_that_count(num_keys_ptr, K, HAS_NUM_KEYS)
    most_s = tl.full((BLOCK,), -float("inf"), tl.float32)
    most_t = tl.full((BLOCK,), -float("inf"), tl.float32)
    if HAS_OWN:
        own_s = tl.load(own_s_ptr + offs, mask=mask, other=0.0)
        most_s = own_s
        if TEACHER:
            own_t = tl.load(own_t_ptr + offs, mask=mask, other=0.0)
            most_t = own_t
    for j in range(0, tiles):
        row = stats_ptr + tl.cast(j, tl.int64) * B + offs
        top = tl.load(row + _MAX_S * step, mask=mask, other=0.0)
        most_s = tl.where(top > most_s, top, most_s)
        if TEACHER:
            top = tl.load(row + _MAX_T * step, mask=mask, other=0.0)
            most_t = tl.where(top > most_t, top, most_t)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    if HAS_OWN:
        sum_s = tl.exp(own_s - most_s)
        if TEACHER:
            sum_t = tl.exp(own_t - most_t)
            c = most_s - own_s
            mean = sum_t * (own_t - most_t + c if ENTROPY else c)
        elif not POSITIVES:
            mean = -own_s
    for j in range(0, tiles):
        row = stats_ptr + tl.cast(j, tl.int64) * B + offs
        w, total, below_s = _relative(row + _MAX_S * step, row + _SUM_S * step, mask, most_s)
        sum_s += w * total
        if TEACHER:
            w, total, below_t = _relative(row + _MAX_T * step, row + _SUM_T * step, mask, most_t)
            sum_t += w * total
            shift = below_t - below_s if ENTROPY else -below_s
            mean += w * (tl.load(row + _MEAN * step, mask=mask, other=0.0) + shift * total)
        elif POSITIVES:
            mean -= tl.load(row + _POSITIVE * step, mask=mask, other=0.0)
    no_key = offs >= B  # or none is left
    if not POSITIVES and not HAS_OWN:
        no_key = no_key | (counting <= 0)
        if MASK:
            no_key = no_key | (most_s == -float("inf"))
        elif HAS_EXCLUDE:
            exclude = tl.load(exclude_ptr + offs, mask=mask, other=-1)
            no_key = no_key | ((exclude == 0) & (counting == 1))
    sum_s = tl.where(no_key, 1.0, sum_s)
    log_s = tl.log(sum_s)
    lse_t = tl.zeros((BLOCK,), tl.float32)
    if TEACHER:
        sum_t = tl.where(no_key, 1.0, sum_t)
        # both maxima have cancelled: c is relative to them
        loss = mean / sum_t + log_s
        if ENTROPY:
            loss -= tl.log(sum_t)
        lse_t = most_t + tl.log(sum_t)
    else:
        loss = mean + most_s + log_s
    if POSITIVES:
        positive = tl.load(positives_ptr + offs, mask=mask, other=0)
        loss = tl.where((positive >= 0) & (positive < counting), loss, float("nan"))
    tl.store(loss_ptr + offs, tl.where(no_key, 0.0, loss), mask=mask)
    tl.store(lse_s_ptr + offs, most_s + log_s, mask=mask)
    tl.store(lse_t_ptr + offs, lse_t, mask=mask)
    if FACTORS:
        for j in range(0, tiles):
            row = stats_ptr + tl.cast(j, tl.int64) * B + offs
            w, _, _ = _relative(row + _MAX_S * step, row + _SUM_S * step, mask, most_s)
            tl.store(row + _MAX_S * step, tl.where(no_key, 0.0, w / sum_s), mask=mask)
            if TEACHER:
                w, _, _ = _relative(row + _MAX_T * step, row + _SUM_T * step, mask, most_t)
                tl.store(row + _MAX_T * step, tl.where(no_key, 0.0, w / sum_t), mask=mask)


@kernel
def _relational_kl_fwd_kernel_product(
    ws_ptr,  # [B, K]
    wt_ptr,  # [B, K], or unused
    stats_ptr,  # [5 or 3, tiles, B] fp32: factors in the maxima's places
    keys_ptr,  # [K, D]
    scale_ptr,  # [K] fp32, or unused
    num_keys_ptr,  # [] int64, or unused
    out_ptr,  # [splits, B, D] fp32
    B,
    K,
    D,
    split_k,  # keys of a split; a multiple of TILE
    stride_kn,
    stride_kd,
    TEACHER: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_NUM_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,  # keys of a tile of weights; a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Student's less teacher's softmax, times the scaled keys."""
    offs_m, offs_n, split = split_tile(B, BLOCK_M, BLOCK_N)
    mask_m = offs_m < B
    step = tl.cast(tl.cdiv(K, TILE), tl.int64) * B
    w_rows = offs_m.to(tl.int64)[:, None] * K
    k_first = split * split_k
    counting = number_that_count(num_keys_ptr, K, HAS_NUM_KEYS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k_first, tl.minimum(k_first + split_k, counting), BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask_k = ks < counting
        read = mask_m[:, None] & mask_k[None, :]
        row = stats_ptr + tl.cast(k // TILE, tl.int64) * B + offs_m
        factor = tl.load(row + _MAX_S * step, mask=mask_m, other=0.0)
        ws = tl.load(ws_ptr + w_rows + ks[None, :], mask=read, other=0.0)
        g = factor[:, None] * ws.to(tl.float32)
        if TEACHER:
            factor = tl.load(row + _MAX_T * step, mask=mask_m, other=0.0)
            wt = tl.load(wt_ptr + w_rows + ks[None, :], mask=read, other=0.0)
            g -= factor[:, None] * wt.to(tl.float32)
        if HAS_SCALE:
            g *= tl.load(scale_ptr + ks, mask=mask_k, other=0.0)[None, :]
        keys = tl.load(
            keys_ptr
            + ks.to(tl.int64)[:, None] * stride_kn
            + offs_n.to(tl.int64)[None, :] * stride_kd,
            mask=mask_k[:, None] & (offs_n < D)[None, :],
            other=0.0,
        )
        acc = dot_weights(g, keys, acc, PRECISION)
    store_split(out_ptr, acc, split, offs_m, offs_n, B, D)
