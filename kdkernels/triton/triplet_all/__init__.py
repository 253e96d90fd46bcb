# SPDX-License-Identifier: Apache-2.0
"""triplet_all on Triton: the operator.

Anchors are taken in chunks: their distances, then losses and weights from each row of distances,
then the gradient that the weights give the rows. Kernels are in `kernels.py`, what this shares with
contrastive in the modules `_labelled_*`. Features are fp16, bf16 or fp32; everything accumulates in
fp32. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._similarity import unit, unit_gradient
from kdkernels.triton.common.launch import cdiv, on_device, supports
from kdkernels.triton.common.pairs import Call, in_order
from kdkernels.triton.triplet_all import kernels

__all__ = ["supports", "triplet_all_fwd"]


def triplet_all_fwd(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B] int64
    references: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M] int64
    in_batch: bool,
    exclude: Tensor | None,  # [B] int64
    normalize: bool,
    negatives: str,
    margin: float,
    soft: bool,
    distance: str,
    need_embeddings: bool,
    need_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, M = len(embeddings), len(references)
    need_references = need_references and not in_batch
    dx = embeddings.new_zeros(embeddings.shape if need_embeddings else (0,), dtype=torch.float32)
    dr = references.new_zeros(references.shape if need_references else (0,), dtype=torch.float32)
    if B == 0 or M == 0:
        return dx.new_zeros(()), labels.new_zeros(()), labels.new_zeros(()), dx, dr
    given = embeddings, references
    if normalize:
        embeddings = unit(embeddings.float())
        references = embeddings if in_batch else unit(references.float())
    weights, semihard = need_embeddings or need_references, negatives == "semihard"
    with on_device(embeddings):
        call = Call(embeddings, labels, references, reference_labels, in_batch, exclude, distance)
        losses = call.new(B, dtype=torch.float64)
        nonzero = call.new(B, dtype=torch.int64)
        chunks = list(call.chunks())
        largest = chunks[0][1]
        d = call.new(largest, M)
        w = call.new(largest if weights else 0, M)
        chosen = call.new(largest if weights and semihard else 0, M, dtype=torch.int32)
        place = call.reference_order
        if semihard:
            place = in_order(torch.arange(M, device=place.device), place)
        for first, rows in chunks:
            close = call.distances(first, rows, d)
            arguments = {
                "d_ptr": d, "w_ptr": w, "chosen_ptr": chosen, "begin_ptr": call.begin,
                "end_ptr": call.end, "exclude_ptr": call.exclude, "margin": margin, "first": first,
                "M": M, "IN_BATCH": in_batch, "EXCLUDES": call.leaves_out, "SEMIHARD": semihard,
                "SOFT": soft, "DISTANCE": call.distance,
                "POSITIVES": call.config.positives, "NEGATIVES": call.config.negatives,
                "num_warps": 8,
            }  # fmt: skip
            kernels._triplet_all_positives_kernel[(rows,)](
                order_ptr=call.reference_order, place_ptr=place, loss_ptr=losses,
                nonzero_ptr=nonzero, WEIGHTS=weights, **arguments,
            )  # fmt: skip
            if not weights:
                continue
            grid = (rows, cdiv(M, call.config.negatives))
            kernels._triplet_all_negatives_kernel[grid](**arguments)
            if need_embeddings:
                dx[first : first + rows] += call.gradient_of(w[:rows], first, close)
            if need_references or (in_batch and need_embeddings):
                gradient = dx if in_batch else dr
                gradient += call.gradient_of(w[:rows], first, close, references=True)
        dx = in_order(dx, call.order) if need_embeddings else dx
        dr = in_order(dr, call.reference_order) if need_references else dr
        return (
            losses.sum().float(),
            nonzero.sum(),
            _valid(call, semihard),
            *(
                unit_gradient(x, g) if normalize and g.dim() == 2 else g
                for x, g in zip(given, (dx, dr), strict=True)
            ),
        )


def _valid(call: Call, semihard: bool) -> Tensor:
    """Number of triplets."""
    same = call.end - call.begin
    others = call.M - same
    if call.in_batch:
        same = same - 1
    elif call.leaves_out:
        positive = (call.exclude >= call.begin) & (call.exclude < call.end)
        same, others = same - positive.long(), others - ((call.exclude >= 0) & ~positive).long()
    return (same * (others.clamp_max(1) if semihard else others)).sum()
