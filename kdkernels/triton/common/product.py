# SPDX-License-Identifier: Apache-2.0
"""Products of tiles of rows, and the product of stored weights with rows: it follows a kernel that
leaves a chunk of weights, or of derivatives, in the L2 cache."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.dots import dot
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import Arch, Tile, given, split_length
from kdkernels.triton.common.prepared import REMEMBERED, Launch


@lru_cache(REMEMBERED)
def _multiply(
    tile: Tile,
    arch: Arch,
    precision: str,
    shape: tuple[int, int, int],  # M, N, K
    strides: tuple[tuple[int, int], ...],  # of w, x and the second x
    stride_keep: int | None,
    has_scale: bool,
    has_count: bool,
    two: bool,
) -> tuple[Launch, int]:
    """The launch, and the splits of the contraction."""
    M, N, K = shape
    w, x, x2 = strides
    tiles = tile.count(M, N)
    length, splits = tile.split(K, tiles, arch)
    launch = Launch(
        _product_kernel, (tiles, splits), M=M, N=N, K=K, split_k=length,
        stride_wg=0, stride_wm=w[0], stride_wk=w[1], stride_xg=0, stride_xk=x[0], stride_xn=x[1],
        stride_x2k=x2[0], stride_x2n=x2[1], stride_keep=stride_keep or 0, stride_os=M * N,
        stride_og=0, GROUPED=False, HAS_SCALE=has_scale, HAS_KEEP=stride_keep is not None,
        HAS_COUNT=has_count, TWO=two, ADD=False, PRECISION=precision, **tile.launch(),
    )  # fmt: skip
    return launch, splits


def multiply_parts(
    tile: Tile,
    arch: Arch,
    precision: str,
    w: Tensor,  # [M, K]
    x: Tensor,  # [K, N]
    out: Tensor,  # [M, N], contiguous, not empty
    *,
    keep: Tensor | None = None,  # [K] int32
    scale: Tensor | None = None,  # [K]
    count: Tensor | None = None,  # [] int64
    second: tuple[Tensor, Tensor] | None = None,  # [M, K] of the strides of w, [K, N]
) -> Tensor | None:  # [splits, M, N] fp32
    """`multiply` but for the sum over parts of the contraction, which it returns if there are
    several. If there is one, it is in `out`."""
    w2, x2 = (w, x) if second is None else second
    M, K = w.shape
    launch, splits = _multiply(
        tile, arch, precision, (M, x.shape[1], K), (w.stride(), x.stride(), x2.stride()),
        None if keep is None else keep.stride(0), scale is not None, count is not None,
        second is not None,
    )  # fmt: skip
    parts = out.new_empty((splits, *out.shape), dtype=torch.float32) if splits > 1 else None
    launch(
        w_ptr=w, x_ptr=x, w2_ptr=w2, x2_ptr=x2, scale_ptr=given(scale, w), keep_ptr=given(keep, w),
        count_ptr=given(count, w), out_ptr=given(parts, out),
    )  # fmt: skip
    return parts


def multiply(
    tile: Tile,
    arch: Arch,
    precision: str,
    w: Tensor,  # [M, K]
    x: Tensor,  # [K, N]
    out: Tensor,  # [M, N], contiguous
    **others: Any,
) -> None:
    """out = (scale w) x over all of K, or its first `count`, plus the product of `second`. Only the
    rows of x that `keep` names are read. The others are those of `multiply_parts`."""
    if out.numel() == 0:
        return
    parts = multiply_parts(tile, arch, precision, w, x, out, **others)
    if parts is not None:
        torch.sum(parts, 0, out=out) if out.dtype == torch.float32 else out.copy_(parts.sum(0))


@lru_cache(REMEMBERED)
def _multiply_groups(
    tile: Tile,
    precision: str,
    shape: tuple[int, int, int, int, int],  # splits, G, M, N, K
    strides: tuple[tuple[int, ...], ...],  # of w, x and out
    add: bool,
) -> Launch:
    splits, G, M, N, K = shape
    w, x, out = strides
    w_group, x_group = (w[0], x[0]) if G > 1 else (0, 0)
    return Launch(
        _product_kernel, (G * tile.count(M, N), splits), M=M, N=N, K=K,
        split_k=split_length(K, splits, tile.k), stride_wg=w_group, stride_wm=w[1], stride_wk=w[2],
        stride_xg=x_group, stride_xk=x[1], stride_xn=x[2], stride_x2k=0, stride_x2n=0,
        stride_keep=0, stride_os=out[0], stride_og=out[1], GROUPED=True, HAS_SCALE=False,
        HAS_KEEP=False, HAS_COUNT=False, TWO=False, ADD=add, PRECISION=precision, **tile.launch(),
    )  # fmt: skip


def multiply_groups(
    tile: Tile,
    precision: str,
    w: Tensor,  # [G, M, K]
    x: Tensor,  # [G, K, N]
    out: Tensor,  # [splits, G, M, N] fp32, rows of N
    *,
    add: bool,
) -> None:
    """out = w x of each group, in partial sums over splits of K. With `add` out += w x, in one
    split."""
    launch = _multiply_groups(
        tile, precision, (len(out), *w.shape[:2], x.shape[2], w.shape[2]),
        (w.stride(), x.stride(), out.stride()), add,
    )  # fmt: skip
    launch(w_ptr=w, x_ptr=x, w2_ptr=w, x2_ptr=x, scale_ptr=w, keep_ptr=w, count_ptr=w, out_ptr=out)


@kernel
def _product_kernel(
    w_ptr,  # [M, K]; [G, M, K] with GROUPED
    x_ptr,  # [K, N]; [G, K, N] with GROUPED
    w2_ptr,  # [M, K] of the strides of w, with TWO
    x2_ptr,  # [K, N], with TWO
    scale_ptr,  # [K] fp32, with HAS_SCALE
    keep_ptr,  # [K] int32, with HAS_KEEP: which rows of x are read
    count_ptr,  # [] int64, with HAS_COUNT: how many of K count, the first ones
    out_ptr,  # [splits, M, N], contiguous; with GROUPED [splits, G, M, N], each [M, N] contiguous
    M,
    N,
    K,
    split_k,  # length of a split; a multiple of BLOCK_K
    stride_wg,
    stride_wm,
    stride_wk,
    stride_xg,
    stride_xk,
    stride_xn,
    stride_x2k,
    stride_x2n,
    stride_keep,
    stride_os,
    stride_og,
    GROUPED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    TWO: tl.constexpr,
    ADD: tl.constexpr,  # to what is there
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(scale w) x, plus w2 x2 with TWO: the contraction over one split of K."""
    m_blocks = tl.cdiv(M, BLOCK_M)
    # row blocks vary fastest, so that programs that share columns of x run together
    tile, split = tl.program_id(0), tl.program_id(1)
    if GROUPED:
        tiles = m_blocks * tl.cdiv(N, BLOCK_N)
        g = (tile // tiles).to(tl.int64)
        w_ptr += g * stride_wg
        x_ptr += g * stride_xg
        out_ptr += g * stride_og + split.to(tl.int64) * stride_os
        tile = tile % tiles
    offs_m = tile % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    # int64: a row number times a row stride passes 2**31 on large inputs
    rows = offs_m.to(tl.int64)[:, None] * stride_wm
    columns = offs_n.to(tl.int64)[None, :]
    last = number_that_count(count_ptr, K, HAS_COUNT)
    k_first = split * split_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k_first, tl.minimum(k_first + split_k, last), BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask_k = ks < last
        mask_w = (offs_m < M)[:, None] & mask_k[None, :]
        wide = ks.to(tl.int64)
        w = tl.load(w_ptr + rows + wide[None, :] * stride_wk, mask=mask_w, other=0.0)
        if HAS_SCALE:
            w = (w * tl.load(scale_ptr + ks, mask=mask_k, other=0.0)[None, :]).to(w.dtype)
        read = mask_k
        if HAS_KEEP:
            read &= tl.load(keep_ptr + ks * stride_keep, mask=mask_k, other=0) != 0
        mask_x = (offs_n < N)[None, :] & read[:, None]
        x_ptrs = x_ptr + wide[:, None] * stride_xk + columns * stride_xn
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        acc = dot(w, x.to(w.dtype), acc, PRECISION)
        if TWO:
            w = tl.load(w2_ptr + rows + wide[None, :] * stride_wk, mask=mask_w, other=0.0)
            x_ptrs = x2_ptr + wide[:, None] * stride_x2k + columns * stride_x2n
            x = tl.load(x_ptrs, mask=mask_x, other=0.0)
            acc = dot(w, x.to(w.dtype), acc, PRECISION)
    if ADD:
        out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        acc += tl.load(out_ptrs, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :], other=0.0)
    if GROUPED:  # out_ptr is that of the split
        split = tl.zeros_like(split)
    store_split(out_ptr, acc, split, offs_m, offs_n, M, N)


@triton.jit
def number_that_count(count_ptr, K, HAS_COUNT: tl.constexpr):
    """How many of K count, the first ones. What lies beyond may be anything."""
    if HAS_COUNT:
        return tl.minimum(tl.load(count_ptr), K).to(tl.int32)
    else:
        return K


@triton.jit
def split_tile(M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, columns, split) of a program that makes a tile of one split of a product."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    offs_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    return offs_m, offs_n, tl.program_id(1)


@triton.jit
def store_split(out_ptr, acc, split, offs_m, offs_n, M, N):
    """The tile of `split_tile` to its place in [splits, M, N], contiguous."""
    tl.store(
        out_ptr + (split.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
    )


@triton.jit
def upper_tile(t):
    """The tile (i, j), i <= j, with number t in the order of columns."""
    j = ((tl.sqrt((8 * t + 1).to(tl.float64)) - 1.0) * 0.5).to(tl.int32)
    return t - j * (j + 1) // 2, j


@triton.jit
def product_tile(
    x_ptrs,  # [m] rows of x
    r_ptrs,  # [n] rows of r
    D,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[m, n] products of contiguous rows."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs[:, None] + ks[None, :], mask=(ks < D)[None, :], other=0.0)
        r = tl.load(r_ptrs[None, :] + ks[:, None], mask=(ks < D)[:, None], other=0.0)
        acc = dot(x, r, acc, PRECISION)
    return acc
