# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss of all pairs, in plain PyTorch.

`contrastive` is the definition; `contrastive_fwd` is the operator, with the gradient by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.reference._distances import distances, gradients_of_pairs, left_out, wide


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
    margin: float,
    distance: str,
    need_embeddings: bool,
    need_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, r = wide(embeddings), wide(references)
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
    return (
        total,
        nonzero,
        dx if need_embeddings else x.new_empty(0),
        dr if need_references and not in_batch else x.new_empty(0),
    )
