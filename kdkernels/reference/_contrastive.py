# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss of all pairs, in plain PyTorch.

`contrastive_loss` is the definition, `contrastive` its sum over pairs, and `contrastive_fwd` the
operator, with the gradient by hand.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdkernels.reference._definition import definition
from kdkernels.reference._distances import distances, gradients_of_pairs, left_out, wide
from kdkernels.reference._labelled import sides
from kdkernels.reference._rows import normalize_backward, unit


@definition
def contrastive_loss(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    *,
    references: Tensor | None = None,  # [M, D]
    reference_labels: Tensor | None = None,  # [M]
    margin: float = 1.0,
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
    normalize_embeddings: bool = True,
    exclude: Tensor | None = None,  # [B]
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
    reduction: Literal["mean", "mean_nonzero", "sum"] = "mean",
) -> Tensor:
    """The definition, differentiable by autograd."""
    found = sides(
        embeddings, labels, references, reference_labels,
        divide=normalize_embeddings or distance == "cosine", exclude=exclude,
        sample_mask=sample_mask, ignore_index=ignore_index,
    )  # fmt: skip
    in_batch, exclude = found.in_batch, found.exclude
    total, nonzero = contrastive(
        *found.rows, in_batch=in_batch, exclude=exclude, margin=margin, distance=distance
    )
    if reduction == "sum":
        return total
    if reduction == "mean_nonzero":
        return total / nonzero.clamp_min(1)
    B, M = len(found.anchors), len(found.bank)
    pairs = B * (B - 1) // 2 if in_batch else B * M
    return total / max(pairs - (0 if exclude is None else int((exclude >= 0).sum())), 1)


def contrastive(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    references: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M]
    *,
    in_batch: bool,
    exclude: Tensor | None = None,  # [B]
    margin: float,
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor]:
    """(sum of the losses of all pairs, number of losses above 0), differentiable by autograd.

    A pair of one label costs d^2 / 2, any other max(margin - d, 0)^2 / 2. `in_batch` says that the
    references are the embeddings themselves: each pair of rows counts once. `exclude` names one
    reference per row that is in no pair with it, or none by -1.
    """
    d = distances(embeddings, references, distance)
    same = labels[:, None] == reference_labels[None]
    losses = torch.where(same, d, (margin - d).clamp_min(0)).square() / 2
    losses = torch.where(_pairs(d, in_batch, exclude), losses, 0.0)
    return losses.sum(), (losses > 0).sum()


def _pairs(d: Tensor, in_batch: bool, exclude: Tensor | None) -> Tensor:
    pairs = ~left_out(exclude, d)
    return pairs.triu(1) if in_batch else pairs


def contrastive_fwd(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor,
    reference_labels: Tensor,
    in_batch: bool,
    exclude: Tensor | None,
    normalize: bool,
    margin: float,
    distance: str,
    need_embeddings: bool,
    need_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, r = (unit(wide(t)) if normalize else wide(t) for t in (embeddings, references))
    total, nonzero = contrastive(
        x, labels, r, reference_labels, in_batch=in_batch, exclude=exclude, margin=margin,
        distance=distance,
    )  # fmt: skip
    dx = dr = x.new_empty(0)
    if need_embeddings or need_references:
        d = distances(x, r, distance)
        same = labels[:, None] == reference_labels[None]
        weight = torch.where(same, d, -(margin - d).clamp_min(0))
        dx, dr = gradients_of_pairs(
            torch.where(_pairs(d, in_batch, exclude), weight, 0.0), d, x, r, distance
        )
        dx = dx + dr if in_batch else dx
        if normalize:
            dx = normalize_backward(embeddings, dx).to(x.dtype)
            dr = normalize_backward(references, dr).to(x.dtype)
    return (
        total,
        nonzero,
        dx if need_embeddings else x.new_empty(0),
        dr if need_references and not in_batch else x.new_empty(0),
    )
