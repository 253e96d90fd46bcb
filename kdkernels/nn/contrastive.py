# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss (Hadsell, Chopra and LeCun, 2006)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.ops._labelled import DISTANCES
from kdkernels.ops.contrastive import REDUCTIONS, contrastive_loss


class ContrastiveLoss(nn.Module):
    r"""Pairs of one label are pulled together, all others pushed apart up to the margin.

    A pair at distance d costs d^2 / 2 if its labels agree, max(margin - d, 0)^2 / 2 if not; every
    pair of the batch counts once. See `kdkernels.contrastive_loss`.

    There is no preset, since of the public codes that go by this name none that we read computes
    this over all pairs of a batch:

    - pytorch-metric-learning's `ContrastiveLoss` does not square, d and max(1 - d, 0), has no
      factor 1 / 2, and adds the mean of the positives' losses > 0 to that of the negatives'.
    - The losses of that name in TensorFlow Addons (no factor 1 / 2) and in sentence-transformers
      take pairs that the user has formed.

    Args:
        weight: Factor of the loss.
        margin: Distance beyond which pairs of different labels cost nothing; not negative.
        distance: "euclidean", "sqeuclidean" or "cosine", as in `kdkernels.contrastive_loss`.
        normalize_embeddings: Unit rows first.
        ignore_index: Label of rows of both sides that do not count, an integer. None: every label
            is a class, -1 too.
        reduction: "mean" (over all pairs), "mean_nonzero" (over losses > 0) or "sum", which is what
            the paper minimises.
        backend: See `kdkernels.explain`.

    Shape:
        - embeddings: [B, D]; labels: [B], any integer dtype.
        - references: [M, D], and reference_labels: [M]: the other side of every pair in place of
          the batch; they receive gradients if they ask for them.
        - exclude: one reference per row that it is not compared with, integer [B], -1 for none: the
          row's own copy, where the references hold the batch. Only with references.
        - sample_mask: which rows of the embeddings count, bool [B], as in
          `kdkernels.contrastive_loss`. None: all.
        - output: scalar, fp32 (fp64 for fp64 embeddings).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.ContrastiveLoss(margin=1.0)
        >>> loss = criterion(embeddings, labels)
        >>> # cross-batch memory: the batch is at `places` of the bank already
        >>> loss = criterion(embeddings, labels, bank, bank_labels, exclude=places)

    Reference:
        Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR
        2006.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        margin: float = 1.0,
        distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
        normalize_embeddings: bool = True,
        ignore_index: int | None = None,
        reduction: Literal["mean", "mean_nonzero", "sum"] = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("distance", distance, DISTANCES)
        _checks.choice("reduction", reduction, REDUCTIONS)
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.margin = _checks.not_negative("margin", margin)
        self.distance = distance
        self.normalize_embeddings = _checks.flag("normalize_embeddings", normalize_embeddings)
        self.ignore_index = _checks.ignore_index(ignore_index)
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        embeddings: Tensor,  # [B, D]
        labels: Tensor,  # [B]
        references: Tensor | None = None,  # [M, D]
        reference_labels: Tensor | None = None,  # [M]
        *,
        exclude: Tensor | None = None,  # [B]
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        return self.weight * contrastive_loss(
            embeddings,
            labels,
            references=references,
            reference_labels=reference_labels,
            margin=self.margin,
            distance=self.distance,
            normalize_embeddings=self.normalize_embeddings,
            exclude=exclude,
            sample_mask=sample_mask,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight:g}, margin={self.margin:g}, distance={self.distance!r}, "
            f"normalize_embeddings={self.normalize_embeddings}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
