# SPDX-License-Identifier: Apache-2.0
"""The definition of the triplet loss, with one triplet per anchor or with several."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels.reference._definition import definition
from kdkernels.reference._labelled import sides
from kdkernels.reference._triplet import hinge, triplet
from kdkernels.reference._triplet_all import triplet_all


@definition
def triplet_loss(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    *,
    references: Tensor | None = None,  # [M, D]
    reference_labels: Tensor | None = None,  # [M]
    mining: Literal["batch_hard", "batch_semihard", "batch_all", "pair_semihard"] = "batch_hard",
    margin: float = 0.2,
    soft: bool = False,
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
    normalize_embeddings: bool = True,
    exclude: Tensor | None = None,  # [B]
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
    reduction: Literal["mean_nonzero", "mean", "sum", "none"] = "mean_nonzero",
) -> Tensor:
    """The definition, differentiable by autograd."""
    found = sides(
        embeddings, labels, references, reference_labels,
        divide=normalize_embeddings or distance == "cosine", exclude=exclude,
        sample_mask=sample_mask, ignore_index=ignore_index,
    )  # fmt: skip
    if mining in ("batch_all", "pair_semihard"):
        _checks.choice("reduction", reduction, ("mean_nonzero", "mean", "sum"))
        total, nonzero, valid = triplet_all(
            *found.rows,
            in_batch=found.in_batch,
            exclude=found.exclude,
            negatives="all" if mining == "batch_all" else "semihard",
            margin=margin,
            soft=soft,
            distance=distance,
        )
        if reduction == "sum":
            return total
        return total / (nonzero if reduction == "mean_nonzero" else valid).clamp_min(1)
    negatives = "hardest" if mining == "batch_hard" else "semihard"
    positive, _, d_ap, d_an = triplet(
        *found.rows, in_batch=found.in_batch, exclude=found.exclude, negatives=negatives,
        distance=distance,
    )  # fmt: skip
    u = d_ap - d_an + margin
    kept = positive >= 0
    losses = torch.where(kept, hinge(u, soft), 0.0)
    if reduction == "none":
        return losses.new_zeros(len(labels)).index_copy(0, found.anchors, losses)
    if reduction == "sum":
        return losses.sum()
    count = (losses > 0 if reduction == "mean_nonzero" else kept).sum()
    return losses.sum() / count.clamp_min(1)
