# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of triplet_loss with one triplet per anchor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.triplet_loss import triplet_loss
from kdkernels.reference._rows import norms, unit
from kdkernels.reference._triplet import pick
from kdkernels.testing.opinfo import BadInput, BenchShape, ByRows, Cost, OpInfo, Sample
from kdkernels.testing.opinfos import _labelled
from kdkernels.testing.opinfos._labelled import shape

FORMS: tuple[dict[str, Any], ...] = (
    {"mining": "batch_semihard"},
    {"soft": True, "reduction": "mean"},
    {"soft": True, "margin": 0.0, "mining": "batch_semihard", "reduction": "sum"},
    {"distance": "sqeuclidean", "reduction": "sum"},
    {"distance": "cosine", "margin": 0.05},
    {"normalize_embeddings": False, "margin": 5.0, "reduction": "mean"},
    {"reduction": "none"},
)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    return _labelled.samples(device, dtype, FORMS, ({}, {"mining": "batch_semihard"}))


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    yield from _labelled.bad_inputs(device)
    x, y = torch.ones(8, 4, device=device), torch.arange(8, device=device) // 2
    wrong = {"mining": "hard"}
    yield BadInput("mining", (x, y), wrong, ValueError, "mining must be one of")
    yield BadInput("soft", (x, y), {"soft": 1}, TypeError, "soft must be True or False")


BENCH = (
    shape("small", 64, 128, 16, "16 identities of 4 images, the PK batch of re-identification"),
    shape("embeddings", 8192, 128, 1024, "large-batch metric learning"),
    shape("pooled", 8192, 512, 1024, "pooled ResNet-18/34 features at large batch"),
    shape("pooled_32k", 32768, 512, 4096, "the same on a GPU", "cuda"),
    shape("huge", 65536, 128, 8192, "a batch whose distances would need 17 GB"),
)


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Half of the products, by symmetry; one read of the embeddings, one write of the gradient."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    return Cost(flops=1.0 * B * B * D, bytes=2.0 * B * D * dtype.itemsize)


MARGIN = 0.2  # the default of the op


def eager(d: Tensor, same: Tensor, other: Tensor) -> Tensor:
    d_ap = torch.where(same & other, d, -torch.inf).amax(1)
    d_an = torch.where(~same, d, torch.inf).amin(1)
    losses = (d_ap - d_an + MARGIN).relu()
    return losses.sum() / above_zero(losses)


def above_zero(losses: Tensor) -> Tensor:
    return (losses > 0).sum().clamp_min(1)


def losses_of_rows(sample: Sample, rows: Tensor) -> Tensor:  # [R]
    """Of anchors. Their triplets are mined by fp64 products, which may only confuse distances that
    are equal to the square root of fp64's rounding; the distances are those of the definition."""
    if sample.kwargs:
        raise ValueError(f"sample must have no option, got {sample.kwargs}")
    x, labels = sample.args
    u = unit(x)
    with torch.no_grad():
        d2 = 2 - 2 * u[rows] @ u.T
        positive, negative, _ = pick(d2, labels[rows], labels, False, rows, "hardest", "hardest")
    d_ap, d_an = (norms(u[rows] - u[of]) for of in (positive, negative))
    return torch.where(positive >= 0, (d_ap - d_an + MARGIN).relu(), 0.0)


SQUARE_PEERS = ("pytorch-metric-learning",)  # which hold all distances
PEERS = (*SQUARE_PEERS, "scikit-learn", "faiss-cpu", "pykeops")

OPINFOS = [
    OpInfo(
        name="triplet_loss",
        op="triplet",
        function=triplet_loss,
        definition=definitions.triplet_loss,
        diff_args=("embeddings",),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=_labelled.bench_sample,
        cost=cost,
        memory=_labelled.memory(6, SQUARE_PEERS),
        eager=_labelled.eager(eager),
        by_rows=ByRows(losses_of_rows, divisor=above_zero),
        magnitude=_labelled.magnitude,
        subtracts=True,
        algorithm_options=(),
        peers=PEERS,
        selects=True,
        contested=_labelled.contested,
    )
]
