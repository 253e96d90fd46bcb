# SPDX-License-Identifier: Apache-2.0
"""sampled_similarity on Triton: the operators.

A program gathers rows of the bank for one row of x, so what limits it is reading them, from the L2
cache where the bank fits in it. Features are fp16, bf16 or fp32; sums are fp32. Nothing waits for
the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import (
    Arch,
    arch_of,
    cdiv,
    fill_device,
    on_device,
    split_length,
    supports,
)

__all__ = ["sampled_similarity_bwd", "sampled_similarity_fwd", "supports"]


@dataclass(frozen=True)
class Config:
    keys: int  # rows of the bank that are read at once
    width: int  # numbers of each of them
    num_warps: int
    arch: Arch

    def split_length(self, programs: int, K: int) -> int:
        """Length of a split of the sum over K, of which each still reads many rows."""
        splits = fill_device(self.arch, programs, K // (8 * self.keys), times=4)
        return split_length(K, splits, self.keys)


@cache
def pick_config(D: int, arch: Arch) -> Config:
    if arch.vendor == "interpreter":  # small enough that samples have several blocks
        return Config(64, 32, 4, arch)
    width = min(128, max(16, triton.next_power_of_2(D)))
    return Config(4096 // width, width, 4, arch)


@triton.jit
def _indices(idx_ptr, i, offs_k, K, N, stride_ib, stride_ik):
    """Indices of row i, which of them name a row, and which are there at all."""
    there = offs_k < K
    at = idx_ptr + i.to(tl.int64) * stride_ib + offs_k.to(tl.int64) * stride_ik
    index = tl.load(at, mask=there, other=0)
    return index, (index >= 0) & (index < N), there


@kernel
def _sampled_similarity_fwd_kernel(
    x_ptr,  # [B, D]
    bank_ptr,  # [N, D]
    idx_ptr,  # [B, K] int64
    out_ptr,  # [B, K] fp32
    N,
    K,
    D,
    stride_xb,
    stride_xd,
    stride_nb,
    stride_nd,
    stride_ib,
    stride_ik,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK_K)
    i = tl.program_id(0) // blocks
    offs_k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    index, inside, there = _indices(idx_ptr, i, offs_k, K, N, stride_ib, stride_ik)
    score = tl.zeros((BLOCK_K,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(
            x_ptr + i.to(tl.int64) * stride_xb + offs_d.to(tl.int64) * stride_xd,
            mask=mask_d,
            other=0.0,
        )
        rows = tl.load(
            bank_ptr + index[:, None] * stride_nb + offs_d.to(tl.int64)[None, :] * stride_nd,
            mask=(there & inside)[:, None] & mask_d[None, :],
            other=0.0,
        )
        score += tl.sum(rows.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    score = tl.where(inside, score, float("nan"))
    tl.store(out_ptr + i.to(tl.int64) * K + offs_k, score, mask=there)


@kernel
def _sampled_similarity_bwd_kernel(
    dscore_ptr,  # [B, K] fp32
    bank_ptr,  # [N, D]
    idx_ptr,  # [B, K] int64
    out_ptr,  # [splits, B, D]
    B,
    N,
    K,
    D,
    split_k,  # length of a split; a multiple of BLOCK_K
    stride_sb,
    stride_sk,
    stride_nb,
    stride_nd,
    stride_ib,
    stride_ik,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK_D)
    i = tl.program_id(0) // blocks
    offs_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    first = split * split_k
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for k in range(first, tl.minimum(first + split_k, K), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        index, inside, there = _indices(idx_ptr, i, offs_k, K, N, stride_ib, stride_ik)
        at = i.to(tl.int64) * stride_sb + offs_k.to(tl.int64) * stride_sk
        weight = tl.load(dscore_ptr + at, mask=there, other=0.0)
        weight = tl.where(inside, weight, float("nan"))
        rows = tl.load(
            bank_ptr + index[:, None] * stride_nb + offs_d.to(tl.int64)[None, :] * stride_nd,
            mask=(there & inside)[:, None] & mask_d[None, :],
            other=0.0,
        )
        acc += weight[:, None] * rows.to(tl.float32)
    tl.store(
        out_ptr + (split.to(tl.int64) * B + i) * D + offs_d,
        tl.sum(acc, 0).to(out_ptr.dtype.element_ty),
        mask=mask_d,
    )


def sampled_similarity_fwd(
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, K] int64
) -> Tensor:
    scores = x.new_empty(indices.shape, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    (B, K), D = indices.shape, x.shape[1]
    config = pick_config(D, arch_of(x))
    with on_device(x):
        _sampled_similarity_fwd_kernel[(B * cdiv(K, config.keys),)](
            x_ptr=x, bank_ptr=bank, idx_ptr=indices, out_ptr=scores, N=bank.shape[0], K=K, D=D,
            stride_xb=x.stride(0), stride_xd=x.stride(1),
            stride_nb=bank.stride(0), stride_nd=bank.stride(1),
            stride_ib=indices.stride(0), stride_ik=indices.stride(1),
            BLOCK_K=config.keys, BLOCK_D=config.width, num_warps=config.num_warps,
        )  # fmt: skip
    return scores


def sampled_similarity_bwd(
    dscores: Tensor,  # [B, K]
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, K] int64
) -> Tensor:
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx
    (B, K), D = indices.shape, x.shape[1]
    config = pick_config(D, arch_of(x))
    programs = B * cdiv(D, config.width)
    length = config.split_length(programs, K)
    splits = max(cdiv(K, length), 1)  # one where K is 0
    target = dx if splits == 1 else x.new_empty((splits, B, D), dtype=torch.float32)
    with on_device(x):
        _sampled_similarity_bwd_kernel[(programs, splits)](
            dscore_ptr=dscores, bank_ptr=bank, idx_ptr=indices, out_ptr=target,
            B=B, N=bank.shape[0], K=K, D=D, split_k=length,
            stride_sb=dscores.stride(0), stride_sk=dscores.stride(1),
            stride_nb=bank.stride(0), stride_nd=bank.stride(1),
            stride_ib=indices.stride(0), stride_ik=indices.stride(1),
            BLOCK_K=config.keys, BLOCK_D=config.width, num_warps=config.num_warps,
        )  # fmt: skip
        return dx if splits == 1 else target.sum(0).to(x.dtype)
