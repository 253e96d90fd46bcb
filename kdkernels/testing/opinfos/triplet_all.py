# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of triplet_loss with several triplets per anchor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kdkernels import reference as definitions
from kdkernels.ops.triplet_loss import triplet_loss
from kdkernels.testing.opinfo import BadInput, BenchShape, Cost, OpInfo, Sample
from kdkernels.testing.opinfos import _labelled
from kdkernels.testing.opinfos._labelled import shape

ALL, SEMIHARD = {"mining": "batch_all"}, {"mining": "pair_semihard"}
FORMS: tuple[dict[str, Any], ...] = (
    {"reduction": "mean"},
    {"soft": True},
    {"soft": True, "margin": 0.0, "reduction": "sum"},
    {"distance": "sqeuclidean", "reduction": "sum"},
    {"distance": "cosine", "margin": 0.05},
    {"normalize_embeddings": False, "margin": 5.0},
    SEMIHARD,
    SEMIHARD | {"soft": True, "distance": "cosine"},
    SEMIHARD | {"normalize_embeddings": False, "distance": "sqeuclidean", "reduction": "sum"},
)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    accept = _labelled.clear_of_kinks
    return _labelled.samples(device, dtype, FORMS, ({}, SEMIHARD), accept, **ALL)


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    yield from _labelled.bad_inputs(device, **ALL)
    x, y = torch.ones(8, 4, device=device), torch.arange(8, device=device) // 2
    none = ALL | {"reduction": "none"}
    message = "reduction must be 'mean_nonzero', 'mean' or 'sum' with mining='batch_all'"
    yield BadInput("none", (x, y), none, ValueError, message)


BENCH = (
    shape("small", 64, 128, 16, "16 identities of 4 images, as in re-identification", **ALL),
    shape("eights", 1024, 128, 128, "8 images of each class, 7 million triplets", **ALL),
    shape("embeddings", 8192, 128, 1024, "large batch, 469 million triplets", **ALL),
)


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Half of the products of distances, by symmetry, and one product of the gradient."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    return Cost(flops=3.0 * B * B * D, bytes=2.0 * B * D * dtype.itemsize)


PEERS = ("pytorch-metric-learning",)


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    """The definition under autograd holds every triplet, the peer B x B x B flags too."""
    B, D, classes = (shape.sizes[name] for name in ("B", "D", "classes"))
    triplets = B * max(B / classes - 1, 0) * (B - B / classes)
    if variant == "eager":
        return (dtype.itemsize + 3.0) * triplets + 4 * B * B * dtype.itemsize
    if variant in PEERS:
        return 1.0 * B**3 + 60.0 * triplets
    if variant in ("mm", "reference"):
        return (1 if variant == "mm" else 6) * B * B * dtype.itemsize
    return 8.0 * B * D * dtype.itemsize


OPINFOS = [
    OpInfo(
        name="triplet_loss_all",
        op="triplet_all",
        function=triplet_loss,
        definition=definitions.triplet_loss,
        diff_args=("embeddings",),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=_labelled.bench_sample,
        cost=cost,
        memory=memory,
        magnitude=_labelled.magnitude,
        subtracts=True,
        algorithm_options=(),
        peers=PEERS,
        baselines=("eager", "mm"),  # torch.compile would unroll the loop over the anchors
        selects=True,
    )
]
