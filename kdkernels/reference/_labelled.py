# SPDX-License-Identifier: Apache-2.0
"""What the definitions of losses of labelled rows share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.reference._rows import unit


class Sides(NamedTuple):
    rows: tuple[Tensor, Tensor, Tensor, Tensor]  # embeddings, labels, references, their labels
    in_batch: bool  # whether the references are the embeddings
    exclude: Tensor | None  # [B], of these rows
    anchors: Tensor  # [B], where these embeddings are among those that were given
    bank: Tensor  # [M], likewise of the references


def sides(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    references: Tensor | None = None,  # [M, D]
    reference_labels: Tensor | None = None,  # [M]
    *,
    divide: bool,
    exclude: Tensor | None = None,  # [B]
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
) -> Sides:
    """The rows that count, of unit norm if asked."""
    in_batch = references is None or reference_labels is None
    anchors = torch.ones_like(labels, dtype=torch.bool) if sample_mask is None else sample_mask
    bank = anchors if in_batch else torch.ones_like(reference_labels, dtype=torch.bool)
    if in_batch:
        references, reference_labels = embeddings, labels
    if ignore_index is not None:
        anchors = anchors & (labels != ignore_index)
        bank = bank & (reference_labels != ignore_index)
    anchors, bank = (x.nonzero().squeeze(1) for x in (anchors, bank))
    if exclude is not None:
        found = exclude[anchors, None] == bank
        exclude = torch.where(found.any(1), found.int().argmax(1), -1) if len(bank) else None
    x, r = embeddings[anchors], references[bank]
    x, r = (unit(x), unit(r)) if divide else (x, r)
    return Sides((x, labels[anchors], r, reference_labels[bank]), in_batch, exclude, anchors, bank)
