# SPDX-License-Identifier: Apache-2.0
"""The product of stored weights, or derivatives, with features: what follows a kernel that leaves a
chunk of them in the L2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.dots import dot
from kdkernels.triton.common.launch import Arch, Tile


def multiply(
    tile: Tile,
    arch: Arch,
    precision: str,
    a: Tensor,  # [M, K]
    x: Tensor,  # [K, N]
    out: Tensor,  # [M, N], contiguous
    keep: Tensor | None = None,  # [K], which rows of x are read
) -> None:
    """out = a x"""
    (M, K), N = a.shape, x.shape[1]
    if out.numel() == 0:
        return
    tiles = tile.count(M, N)
    length, splits = tile.split(K, tiles, arch)
    target = out if splits == 1 else out.new_empty((splits, M, N), dtype=torch.float32)
    _product_kernel[(tiles, splits)](
        a_ptr=a, x_ptr=x, keep_ptr=a if keep is None else keep, out_ptr=target,
        M=M, N=N, K=K, split_k=length,
        stride_am=a.stride(0), stride_ak=a.stride(1),
        stride_xk=x.stride(0), stride_xn=x.stride(1),
        stride_keep=0 if keep is None else keep.stride(0),
        HAS_MASK=keep is not None, PRECISION=precision, **tile.launch(),
    )  # fmt: skip
    if splits > 1:
        torch.sum(target, 0, out=out) if out.dtype == torch.float32 else out.copy_(target.sum(0))


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


@triton.jit
def _product_kernel(
    a_ptr,  # [M, K]
    x_ptr,  # [K, N]
    keep_ptr,  # [K] int32, or unused: which rows of x are read
    out_ptr,  # [splits, M, N]
    M,
    N,
    K,
    split_k,  # length of a split; a multiple of BLOCK_K
    stride_am,
    stride_ak,
    stride_xk,
    stride_xn,
    stride_keep,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m, offs_n, split = split_tile(M, BLOCK_M, BLOCK_N)
    k_first = split * split_k
    a_ptrs = a_ptr + offs_m.to(tl.int64)[:, None] * stride_am
    x_ptrs = x_ptr + offs_n.to(tl.int64)[None, :] * stride_xn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(k_first, tl.minimum(k_first + split_k, K), BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask_k = ks < K
        a = tl.load(
            a_ptrs + ks.to(tl.int64)[None, :] * stride_ak,
            mask=(offs_m < M)[:, None] & mask_k[None, :],
            other=0.0,
        )
        read = mask_k
        if HAS_MASK:
            read &= tl.load(keep_ptr + ks * stride_keep, mask=mask_k, other=0) != 0
        x = tl.load(
            x_ptrs + ks.to(tl.int64)[:, None] * stride_xk,
            mask=(offs_n < N)[None, :] & read[:, None],
            other=0.0,
        )
        acc = dot(a, x.to(a.dtype), acc, PRECISION)
    store_split(out_ptr, acc, split, offs_m, offs_n, M, N)
