# SPDX-License-Identifier: Apache-2.0
"""Launcher of csrc/triplet_all/triplet_all_cuda.cpp. Labels are sorted by torch, CUB on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._gpu import sorted_exclude
from kdkernels.cuda._common import given_rows_gradients, ieee, unit_rows
from kdkernels.cuda.triplet import supports

__all__ = ["supports", "triplet_all_fwd"]

_ops = torch.ops.kdkernels_cuda


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
    given = embeddings, references
    if normalize:
        embeddings, references = unit_rows(embeddings, references, in_batch)
    labels, order = labels.sort(stable=True)
    reference_labels, reference_order = (
        (labels, order) if in_batch else reference_labels.sort(stable=True)
    )
    if exclude is not None:
        exclude = sorted_exclude(exclude, order, reference_order)
    *sums, dx, dr = _ops.triplet_all_fwd(
        embeddings, labels, order, references, reference_labels, reference_order, in_batch, exclude,
        negatives, margin, soft, distance, need_embeddings, need_references, ieee(),
    )  # fmt: skip
    gradients = given_rows_gradients(given, (dx, dr)) if normalize else (dx, dr)
    return *sums, *gradients
