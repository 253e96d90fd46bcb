# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/triplet/triplet_cuda.cpp. Sorting is torch's, which is CUB's on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import Contributions, refuse_fp64, triplet_gradients
from kdkernels.cuda._common import given_rows_gradients, ieee, unit_rows

_ops = torch.ops.kdkernels_cuda


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    return refuse_fp64(args[0])  # the embeddings forward, the gradient of a distance backward


def triplet_fwd(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B] int64
    references: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M] int64
    in_batch: bool,
    exclude: Tensor | None,  # [B] int64
    normalize: bool,
    positives: str,
    negatives: str,
    margin: float,
    soft: bool,
    distance: str,
) -> tuple[Tensor, ...]:
    if len(embeddings) == 0 or len(references) == 0:
        none = labels.new_full(labels.shape, -1)
        zero = embeddings.new_zeros(len(embeddings), dtype=torch.float32)
        return (
            zero.sum(), none.new_zeros(()), none.new_zeros(()), zero, none, none.clone(),
            zero.clone(), zero.clone(),
        )  # fmt: skip
    if normalize:
        embeddings, references = unit_rows(embeddings, references, in_batch)
    labels, order = labels.sort(stable=True)
    x = embeddings[order]
    sorted_references, reference_order = x, order
    if in_batch:
        reference_labels = labels
    else:
        reference_labels, reference_order = reference_labels.sort(stable=True)
        sorted_references = references[reference_order]
    positive, negative, d_ap, d_an = _ops.triplet_fwd(
        x, labels, order, references, sorted_references, reference_labels, reference_order,
        in_batch, exclude, positives, negatives, distance, ieee(),
    )  # fmt: skip
    u, kept = d_ap - d_an + margin, positive >= 0
    # softplus of torch turns linear at a threshold
    losses = torch.logaddexp(u, u.new_zeros(())) if soft else u.relu()
    losses = torch.where(kept, losses, 0.0)
    return (
        losses.sum(), (losses > 0).sum(), kept.sum(), losses, positive, negative, d_ap, d_an,
    )  # fmt: skip


def triplet_bwd(
    dloss: Tensor,  # [] or [B]
    embeddings: Tensor,  # [B, D]
    references: Tensor,  # [M, D]
    positive: Tensor,  # [B] int64
    negative: Tensor,  # [B] int64
    d_ap: Tensor,  # [B]
    d_an: Tensor,  # [B]
    in_batch: bool,
    normalize: bool,
    need_embeddings: bool,
    need_references: bool,
    margin: float,
    soft: bool,
    distance: str,
) -> tuple[Tensor, Tensor]:
    u = d_ap - d_an + margin
    du = dloss * u.sigmoid() if soft else torch.where(u <= 0, 0.0, dloss)
    given = embeddings, references
    if normalize:
        embeddings, references = unit_rows(embeddings, references, in_batch)

    def gradient(contributions: Contributions, as_anchor: bool, as_chosen: bool) -> Tensor:
        chosen, d, dd, order, begin = contributions
        return _ops.triplet_gradient(
            dd, embeddings, references, chosen, d, order, begin, as_anchor, as_chosen, distance
        )

    gradients = triplet_gradients(
        gradient, du, -du, embeddings, references, positive, negative, d_ap, d_an, in_batch,
        need_embeddings, need_references,
    )  # fmt: skip
    if not normalize:
        return gradients
    dx, dr = given_rows_gradients(given, gradients)
    return dx.to(given[0].dtype), dr.to(given[1].dtype)
