# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/triplet/triplet_cuda.cpp. Sorting is torch's, which is CUB's on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import Contributions, refuse_fp64, triplet_gradients
from kdkernels.cuda._common import ieee

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
    positives: str,
    negatives: str,
    distance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(embeddings) == 0 or len(references) == 0:
        none = labels.new_full(labels.shape, -1)
        zero = embeddings.new_zeros(len(embeddings), dtype=torch.float32)
        return none, none.clone(), zero, zero.clone()
    labels, order = labels.sort(stable=True)
    x = embeddings[order]
    sorted_references, reference_order = x, order
    if in_batch:
        reference_labels = labels
    else:
        reference_labels, reference_order = reference_labels.sort(stable=True)
        sorted_references = references[reference_order]
    return _ops.triplet_fwd(
        x, labels, order, references, sorted_references, reference_labels, reference_order,
        in_batch, exclude, positives, negatives, distance, ieee(),
    )  # fmt: skip


def triplet_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    *args, distance = args
    embeddings, references = args[2:4]

    def gradient(contributions: Contributions, as_anchor: bool, as_chosen: bool) -> Tensor:
        chosen, d, dd, order, begin = contributions
        return _ops.triplet_gradient(
            dd, embeddings, references, chosen, d, order, begin, as_anchor, as_chosen, distance
        )

    return triplet_gradients(gradient, *args)
