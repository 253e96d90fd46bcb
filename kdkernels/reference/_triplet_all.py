# SPDX-License-Identifier: Apache-2.0
"""Triplet losses with several triplets per anchor, in plain PyTorch.

`triplet_all` is the definition; `triplet_all_fwd` is the operator, with the gradient by hand. Both
walk over the anchors, so neither holds more than the distances and the triplets of one anchor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdkernels.reference._distances import distances, gradients_of_pairs, left_out, wide
from kdkernels.reference._rows import normalize_backward, unit
from kdkernels.reference._triplet import hinge


def triplet_all(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    references: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M]
    *,
    in_batch: bool,
    exclude: Tensor | None = None,  # [B]
    negatives: str = "all",
    margin: float,
    soft: bool = False,
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the losses, number of losses above 0, number of triplets), differentiable.

    negatives="all" takes every positive with every negative. "semihard" takes every positive with
    the nearest negative strictly beyond it, or where there is none with the farthest. `in_batch`
    says that the references are the embeddings: an anchor is not the positive of itself. `exclude`
    names one reference per anchor that is neither its positive nor its negative, or none by -1.
    """
    d = distances(embeddings, references, distance)
    total = d[:0].sum()
    nonzero, valid = (torch.zeros((), dtype=torch.int64, device=d.device) for _ in range(2))
    rows = labels, reference_labels, in_batch, exclude
    for _, u, _, _ in _triplets(d, *rows, negatives, margin):
        losses = hinge(u, soft)
        total = total + losses.sum()
        nonzero, valid = nonzero + (losses > 0).sum(), valid + losses.numel()
    return total, nonzero, valid


def _triplets(
    d: Tensor,  # [B, M]
    labels: Tensor,
    reference_labels: Tensor,
    in_batch: bool,
    exclude: Tensor | None,
    negatives: str,
    margin: float,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each anchor with triplets: (anchor, d_ap - d_an + margin [P, K], positives [P],
    negatives [P, K])."""
    out = left_out(exclude, d)
    for a, row in enumerate(d.unbind()):
        same = labels[a] == reference_labels
        n = (~(same | out[a])).nonzero().squeeze(1)
        if in_batch:
            same[a] = False
        p = (same & ~out[a]).nonzero().squeeze(1)
        if len(p) == 0 or len(n) == 0:
            continue
        d_ap, d_an = row[p][:, None], row[n][None]
        if negatives == "semihard":
            beyond = ~(d_an <= d_ap)
            nearest = torch.where(beyond, d_an, torch.inf).argmin(1)
            chosen = torch.where(beyond.any(1), nearest, d_an.argmax())[:, None]
            d_an, n = d_an[0, chosen], n[chosen]
        else:
            n = n.expand(len(p), -1)
        yield a, d_ap - d_an + margin, p, n


def triplet_all_fwd(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor,
    reference_labels: Tensor,
    in_batch: bool,
    exclude: Tensor | None,
    normalize: bool,
    negatives: str,
    margin: float,
    soft: bool,
    distance: str,
    need_embeddings: bool,
    need_references: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, r = (unit(wide(t)) if normalize else wide(t) for t in (embeddings, references))
    total, nonzero, valid = triplet_all(
        x, labels, r, reference_labels, in_batch=in_batch, exclude=exclude, negatives=negatives,
        margin=margin, soft=soft, distance=distance,
    )  # fmt: skip
    dx = dr = x.new_empty(0)
    if need_embeddings or need_references:
        d = distances(x, r, distance)
        weight = torch.zeros_like(d)
        rows = labels, reference_labels, in_batch, exclude
        for a, u, p, n in _triplets(d, *rows, negatives, margin):
            slope = u.sigmoid() if soft else torch.where(u > 0, 1.0, 0 * u)
            weight[a].index_add_(0, p, slope.sum(1))
            weight[a].index_add_(0, n.flatten(), slope.flatten(), alpha=-1)
        dx, dr = gradients_of_pairs(weight, d, x, r, distance)
        dx = dx + dr if in_batch else dx
        if normalize:
            dx = normalize_backward(embeddings, dx).to(x.dtype)
            dr = normalize_backward(references, dr).to(x.dtype)
    return (
        total,
        nonzero,
        valid,
        dx if need_embeddings else x.new_empty(0),
        dr if need_references and not in_batch else x.new_empty(0),
    )
