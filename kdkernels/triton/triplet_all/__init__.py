# SPDX-License-Identifier: Apache-2.0
"""triplet_all on Triton: the operator.

Anchors are taken in chunks: their distances, then losses and weights from each row of distances,
then the gradient that the weights give the rows. Kernels are in `kernels.py`, what this shares with
contrastive in `common/pairs.py`. Features are fp16, bf16 or fp32; everything accumulates in
fp32. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.triton.common.launch import cdiv, on_device, supports
from kdkernels.triton.common.pairs import Call, added, joined
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
    nothing = embeddings.new_empty(0, dtype=torch.float32)
    if B == 0 or M == 0:
        dx = torch.zeros_like(embeddings, dtype=torch.float32) if need_embeddings else nothing
        dr = torch.zeros_like(references, dtype=torch.float32) if need_references else nothing
        return dx.new_zeros(()), labels.new_zeros(()), labels.new_zeros(()), dx, dr.clone()
    weights, semihard = need_embeddings or need_references, negatives == "semihard"
    with on_device(embeddings):
        call = Call(
            embeddings, labels, references, reference_labels, in_batch, exclude, normalize,
            distance, stretches=True,
        )  # fmt: skip
        losses = call.new(B, dtype=torch.float64)
        nonzero, valid = (call.new(B, dtype=torch.int64) for _ in range(2))
        chunks = list(call.chunks())
        largest = chunks[0][1]
        d = call.new(largest, M)
        w = call.new(largest if weights else 0, M)
        chosen = call.new(largest if weights and semihard else 0, M, dtype=torch.int32)
        anchors: list[Tensor] = []
        others: Tensor | None = None
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
                order_ptr=call.reference_order, place_ptr=call.place, loss_ptr=losses,
                nonzero_ptr=nonzero, valid_ptr=valid, WEIGHTS=weights, **arguments,
            )  # fmt: skip
            if not weights:
                continue
            grid = (rows, cdiv(M, call.config.negatives))
            kernels._triplet_all_negatives_kernel[grid](**arguments)
            if need_embeddings:
                anchors.append(call.gradient_of(w[:rows], first, close))
            if need_references or (in_batch and need_embeddings):
                others = added(others, call.gradient_of(w[:rows], first, close, references=True))
        dx, dr = nothing, torch.empty_like(nothing)
        if need_embeddings:
            dx = call.given_gradient(joined(anchors), others if in_batch else None)
        if need_references:
            dr = call.given_gradient(others, references=True)
        return *call.sums(losses, nonzero, valid), dx, dr
