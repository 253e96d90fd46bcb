# SPDX-License-Identifier: Apache-2.0
"""contrastive on Triton: the operator.

Anchors are taken in chunks whose weights are held; they are made with the distances. What this
shares with triplet_all is in `common/pairs.py`. Features are fp16, bf16 or
fp32; everything accumulates in fp32. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from kdkernels.triton.common.distances import distance_tile, gradient_weight
from kdkernels.triton.common.jit import kernel
from kdkernels.triton.common.launch import on_device, supports
from kdkernels.triton.common.pairs import Call, added, joined
from kdkernels.triton.common.pairs_kernels import store_close

__all__ = ["contrastive_fwd", "supports"]


@kernel
def _contrastive_pairs_kernel(
    x_ptr,  # [B, D]
    r_ptr,  # [M, D]
    given_x_ptr,  # [B, D]
    given_r_ptr,  # [M, D]
    x_norm_ptr,  # [B] fp32, squared
    r_norm_ptr,  # [M] fp32, squared
    x_label_ptr,  # [B] int64
    r_label_ptr,  # [M] int64
    w_ptr,  # [rows, M] fp32: weights of the anchors from row `first` on
    close_ptr,  # [tiles of rows, tiles of M] int32: whether two rows there are close
    loss_ptr,  # [tiles] fp64
    nonzero_ptr,  # [tiles] int64
    exclude_ptr,  # [B] int64; with EXCLUDES
    margin,
    first,
    rows,
    B,
    M,
    D,
    IN_BATCH: tl.constexpr,
    EXCLUDES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DISTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m_blocks = tl.cdiv(rows, BLOCK_M)
    local = (tl.program_id(0) % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    at_m = tl.minimum(first + local, B - 1)
    at_n = tl.minimum(offs_n, M - 1)
    d, close = distance_tile(
        x_ptr, r_ptr, given_x_ptr, given_r_ptr, x_norm_ptr, r_norm_ptr, at_m, at_n, D, IN_BATCH,
        DISTANCE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    same = tl.load(x_label_ptr + at_m)[:, None] == tl.load(r_label_ptr + at_n)[None, :]
    short = margin - d
    excess = tl.where(same, d, tl.where(short <= 0.0, 0.0, short))  # NaN stays
    if EXCLUDES:
        left_out = tl.load(exclude_ptr + at_m).to(tl.int32)
        excess = tl.where(left_out[:, None] == offs_n[None, :], 0.0, excess)
    # few masks at a time, of which AMD devices hold few: a row past an end is in no pair
    row = at_m if IN_BATCH else tl.full((BLOCK_M,), -1, tl.int32)
    row = tl.where(local < rows, row, M)
    column = tl.where(offs_n < M, offs_n, -1)
    # with IN_BATCH a pair counts once, though both rows receive its gradient
    loss = tl.where(row[:, None] < column[None, :], 0.5 * excess * excess, 0.0)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(loss).to(tl.float64))
    count = tl.sum((loss > 0.0).to(tl.int32))
    tl.store(nonzero_ptr + tl.program_id(0), count.to(tl.int64))
    if WEIGHTS:
        w = gradient_weight(tl.where(same, excess, -excess), d, DISTANCE)
        if IN_BATCH:
            w = tl.where(at_m[:, None] == at_n[None, :], 0.0, w)
        inside = (local < rows)[:, None] & (offs_n < M)[None, :]
        tl.store(w_ptr + local.to(tl.int64)[:, None] * M + offs_n[None, :], w, mask=inside)
        store_close(close_ptr, close, m_blocks, tl.cdiv(M, BLOCK_N))


def contrastive_fwd(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B] int64
    references: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M] int64
    in_batch: bool,
    exclude: Tensor | None,  # [B] int64
    normalize: bool,
    margin: float,
    distance: str,
    need_embeddings: bool,
    need_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, M = len(embeddings), len(references)
    need_references = need_references and not in_batch
    nothing = embeddings.new_empty(0, dtype=torch.float32)
    if B == 0 or M == 0:
        dx = torch.zeros_like(embeddings, dtype=torch.float32) if need_embeddings else nothing
        dr = torch.zeros_like(references, dtype=torch.float32) if need_references else nothing
        return dx.new_zeros(()), labels.new_zeros(()), dx, dr.clone()
    weights = need_embeddings or need_references
    with on_device(embeddings):
        call = Call(
            embeddings, labels, references, reference_labels, in_batch, exclude, normalize, distance
        )
        chunks = list(call.chunks()) if weights else [(0, B)]
        w = call.new(chunks[0][1] if weights else 0, M)
        counts = [math.prod(call.tiles(rows)) for _, rows in chunks]
        losses = call.new(sum(counts), dtype=torch.float64)
        nonzero = call.new(sum(counts), dtype=torch.int64)
        parts = zip(chunks, losses.split(counts), nonzero.split(counts), strict=True)
        anchors: list[Tensor] = []
        others: Tensor | None = None
        for (first, rows), loss, count in parts:
            close = call.new(*(call.tiles(rows) if weights else (0, 0)), dtype=torch.int32)
            _contrastive_pairs_kernel[(len(loss),)](
                x_label_ptr=call.labels, r_label_ptr=call.reference_labels, w_ptr=w,
                close_ptr=close, loss_ptr=loss, nonzero_ptr=count, exclude_ptr=call.exclude,
                margin=margin, first=first, rows=rows, EXCLUDES=call.leaves_out, WEIGHTS=weights,
                **call.distance_arguments(),
            )  # fmt: skip
            # in batch from both halves of the weights, which are symmetric
            if need_embeddings:
                anchors.append(call.gradient_of(w[:rows], first, close))
            if need_references:
                others = added(others, call.gradient_of(w[:rows], first, close, references=True))
        dx, dr = nothing, torch.empty_like(nothing)
        if need_embeddings:
            dx = call.given_gradient(joined(anchors))
        if need_references:
            dr = call.given_gradient(others, references=True)
        return *call.sums(losses, nonzero), dx, dr
