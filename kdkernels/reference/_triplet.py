# SPDX-License-Identifier: Apache-2.0
"""Triplets mined among labelled embeddings, in plain PyTorch.

`triplet` is the definition: all distances, and per anchor the positive and the negative asked for.
`triplet_fwd` and `triplet_bwd` are the operator pair. Distances are those of exact differences,
never |x|^2 + |y|^2 - 2 <x, y>. NaN counts as the extreme, and as beyond any other distance.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels._mined_triplets import MinedTriplets
from kdkernels.reference._definition import definition
from kdkernels.reference._distances import distances, left_out, wide
from kdkernels.reference._labelled import sides
from kdkernels.reference._rows import normalize_backward, unit


@definition
def mine_triplets(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    *,
    references: Tensor | None = None,  # [M, D]
    reference_labels: Tensor | None = None,  # [M]
    positives: Literal["hardest", "semihard", "easiest"] = "hardest",
    negatives: Literal["hardest", "semihard", "easiest"] = "hardest",
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
    normalize_embeddings: bool = True,
    exclude: Tensor | None = None,  # [B]
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
) -> MinedTriplets:
    """The triplets of the anchors that have one."""
    found = sides(
        embeddings, labels, references, reference_labels,
        divide=normalize_embeddings or distance == "cosine", exclude=exclude,
        sample_mask=sample_mask, ignore_index=ignore_index,
    )  # fmt: skip
    with torch.no_grad():
        mined = triplet(
            *found.rows, in_batch=found.in_batch, exclude=found.exclude, positives=positives,
            negatives=negatives, distance=distance,
        )  # fmt: skip
    chosen = (mined[0] >= 0).nonzero().squeeze(1)
    positive, negative, d_ap, d_an = (x[chosen] for x in mined)
    return MinedTriplets(
        found.anchors[chosen], found.bank[positive], found.bank[negative], d_ap, d_an
    )


def triplet(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    references: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M]
    *,
    in_batch: bool,
    exclude: Tensor | None = None,  # [B]
    positives: str = "hardest",
    negatives: str = "hardest",
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each [B]
    """(index of the positive, of the negative, d_ap, d_an), differentiable by autograd.

    `in_batch` says that the references are the embeddings: an anchor is not the positive of itself.
    `exclude` names one reference per anchor that is neither its positive nor its negative, or none
    by -1. An anchor that lacks one of the two has index -1 twice and distances 0; ties go to the
    lowest index. "cosine" takes unit vectors.
    """
    d = distances(embeddings, references, distance)
    positive, negative, valid = pick(
        d, labels, reference_labels, in_batch, exclude, positives, negatives
    )

    def chosen(index: Tensor) -> Tensor:
        if d.shape[1] == 0:
            return d.sum(1)
        return torch.where(valid, d.gather(1, index.clamp_min(0)[:, None]).squeeze(1), 0.0)

    return positive, negative, chosen(positive), chosen(negative)


def pick(
    d: Tensor,  # [B, M]
    labels: Tensor,
    reference_labels: Tensor,
    in_batch: bool,
    exclude: Tensor | None,
    positives: str,
    negatives: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(positive, negative, whether the anchor has both), each [B]; -1 where it has not."""
    d = d.detach()
    same = labels[:, None] == reference_labels[None]
    others = ~left_out(exclude, d)
    is_positive, is_negative = same & others, ~same & others
    if in_batch:
        is_positive = is_positive & ~torch.eye(len(labels), dtype=torch.bool, device=d.device)

    def extreme(mask: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
        """(index of the extreme, or 0; its distance), both [B, 1]."""
        if d.shape[1] == 0:
            return torch.zeros_like(labels)[:, None], d.new_zeros(len(d), 1)
        masked = torch.where(mask, d, -torch.inf if largest else torch.inf)
        index = (masked.argmax(1) if largest else masked.argmin(1))[:, None]
        # a masked row of infinities may have picked an index outside the mask
        index = torch.where(mask.gather(1, index), index, mask.to(torch.int8).argmax(1)[:, None])
        return index, d.gather(1, index)

    if positives == "paired":
        is_positive = torch.eye(*d.shape, dtype=torch.bool, device=d.device)
    if positives == "semihard":
        n, d_an = extreme(is_negative, negatives == "easiest")
        is_positive = is_positive & ~(d >= d_an)
        p, _ = extreme(is_positive, True)
    else:
        p, d_ap = extreme(is_positive, positives != "easiest")
        if negatives == "semihard":
            is_negative = is_negative & ~(d <= d_ap)
            n, _ = extreme(is_negative, False)
        else:
            n, _ = extreme(is_negative, negatives == "easiest")
    valid = is_positive.any(1) & is_negative.any(1)
    return torch.where(valid, p[:, 0], -1), torch.where(valid, n[:, 0], -1), valid


def triplet_fwd(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor,
    reference_labels: Tensor,
    in_batch: bool,
    exclude: Tensor | None,
    normalize: bool,
    positives: str,
    negatives: str,
    margin: float,
    soft: bool,
    distance: str,
) -> tuple[Tensor, ...]:
    x, r = (unit(wide(t)) if normalize else t for t in (embeddings, references))
    positive, negative, d_ap, d_an = triplet(
        x, labels, r, reference_labels, in_batch=in_batch, exclude=exclude,
        positives=positives, negatives=negatives, distance=distance,
    )  # fmt: skip
    kept = positive >= 0
    losses = torch.where(kept, hinge(d_ap - d_an + margin, soft), 0.0)
    return (
        losses.sum(), (losses > 0).sum(), kept.sum(), losses, positive, negative, d_ap, d_an,
    )  # fmt: skip


def hinge(u: Tensor, soft: bool) -> Tensor:
    """max(u, 0), or log(1 + e^u)."""
    return F.softplus(u, threshold=1e3) if soft else u.clamp_min(0)  # torch's is linear above it


def triplet_bwd(
    dloss: Tensor,  # [] or [B]
    embeddings: Tensor,
    references: Tensor,
    positive: Tensor,
    negative: Tensor,
    d_ap: Tensor,
    d_an: Tensor,
    in_batch: bool,
    normalize: bool,
    need_embeddings: bool,
    need_references: bool,
    margin: float,
    soft: bool,
    distance: str,
) -> tuple[Tensor, Tensor]:
    x, r = (unit(wide(t)) if normalize else wide(t) for t in (embeddings, references))
    dx, dr = (t.new_zeros(t.shape) for t in (x, r))
    valid = (positive >= 0).nonzero().squeeze(1)
    u = d_ap - d_an + margin
    du = dloss * u.sigmoid() if soft else torch.where(u <= 0, 0.0, dloss)
    for index, d, dd in ((positive, d_ap, du), (negative, d_an, -du)):
        at, weight = index[valid], dd[valid].to(x.dtype)
        if distance == "euclidean":  # 0 at coincident points
            weight = torch.where(d[valid] == 0, 0.0, weight / d[valid])
        elif distance == "sqeuclidean":
            weight = 2 * weight
        step = weight[:, None] * (x[valid] - r[at])
        dx[valid] += step
        (dx if in_batch else dr).index_add_(0, at, step, alpha=-1)

    def gradient(rows: Tensor, drows: Tensor, needed: bool) -> Tensor:
        if not needed:
            return rows.new_empty(0)
        drows = normalize_backward(rows, drows) if normalize else drows
        return drows.to(rows.dtype).contiguous()

    return (
        gradient(embeddings, dx, need_embeddings),
        gradient(references, dr, need_references and not in_batch),
    )
