# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of contrastive_loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.contrastive import contrastive_loss
from kdkernels.testing.opinfo import BadInput, BenchShape, Cost, OpInfo, Sample
from kdkernels.testing.opinfos import _labelled
from kdkernels.testing.opinfos._labelled import shape

FORMS: tuple[dict[str, Any], ...] = (
    {"reduction": "mean_nonzero", "margin": 1.2},
    {"margin": 0.0, "reduction": "sum"},
    {"distance": "sqeuclidean", "reduction": "sum"},
    {"distance": "cosine", "margin": 0.7},
    {"normalize_embeddings": False, "margin": 6.0},
)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    return _labelled.samples(
        device, dtype, FORMS, ({}, {"reduction": "mean_nonzero", "margin": 1.2})
    )


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    return _labelled.bad_inputs(device)


BENCH = (
    shape("small", 64, 128, 16, "16 identities of 4 images, the PK batch of re-identification"),
    shape("embeddings", 8192, 128, 1024, "large-batch metric learning", margin=1.5),
)


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Half of the products of distances, by symmetry, and one product of the gradient."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    return Cost(flops=3.0 * B * B * D, bytes=2.0 * B * D * dtype.itemsize)


def eager(d: Tensor, same: Tensor, other: Tensor, margin: float = 1.0) -> Tensor:
    losses = torch.where(same, d, (margin - d).relu()).square() / 2
    pairs = len(d) * (len(d) - 1)
    return torch.where(other, losses, 0.0).sum() / max(pairs, 1)


OPINFOS = [
    OpInfo(
        name="contrastive_loss",
        op="contrastive",
        function=contrastive_loss,
        definition=definitions.contrastive_loss,
        diff_args=("embeddings",),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=_labelled.bench_sample,
        cost=cost,
        memory=_labelled.memory(6),
        algorithm_options=(),
        eager=_labelled.eager(eager),
    )
]
