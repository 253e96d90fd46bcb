# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of pkt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.pkt import pkt
from kdkernels.reference import _pkt as reference
from kdkernels.reference._rows import norms
from kdkernels.testing.opinfo import (
    BadInput,
    BenchShape,
    ByRows,
    Cost,
    Eager,
    OpInfo,
    Sample,
    randn,
)
from kdkernels.testing.opinfos import _two_sides

SHAPES = {  # B, D_s, D_t
    "tiny": (2, 3, 2),
    "aligned": (64, 16, 16),
    "ragged_rows": (37, 8, 8),
    "ragged_cols": (16, 37, 21),
    "ragged_all": (35, 13, 9),
    "one_row": (1, 7, 5),
    "one_col": (19, 1, 1),
    "wide": (7, 71, 37),
}
FORMS: tuple[dict[str, Any], ...] = (
    {"kernel": "student_t", "divergence": "kl"},
    {"kernel": "cosine", "divergence": "jeffreys"},
    {"kernel": "student_t", "divergence": "jeffreys"},
)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def pair(B: int, D_s: int, D_t: int) -> tuple[Tensor, Tensor]:
        return tuple(
            randn(B, D, seed=seed, device=device, dtype=dtype) for D, seed in ((D_s, 1), (D_t, 2))
        )

    for name, shape in SHAPES.items():
        # of one row P is 1, of two there is one number, and of one column u is 1 or -1
        cancels = name in ("one_row", "tiny", "one_col")
        yield Sample(name, pair(*shape), cancels=cancels)
    s, t = pair(46, 12, 20)
    yield Sample("strided", (s.T.contiguous().T[::2], torch.cat([t, t], 1)[:23, ::2]))
    yield Sample("empty", pair(0, 4, 6))
    yield Sample("no_features", pair(5, 0, 0))
    near = s[:23] + 0.01 * randn(23, 12, seed=3, device=device, dtype=dtype)
    yield Sample("default", pair(9, 5, 7))
    for form in FORMS:
        label = "-".join(form.values())
        yield Sample(label, pair(9, 5, 7), form)
        yield Sample(f"{label}-tall", pair(43, 11, 5), form)
    both = FORMS[-1]
    yield Sample("near", (near, s[:23]), cancels=True)
    yield Sample("near-student_t", (near, s[:23]), both, cancels=True)
    equal = (s[:1].expand(21, -1), t[:1].expand(21, -1))
    yield Sample("all_equal", equal, cancels=True)
    yield Sample("all_equal-student_t", equal, both, cancels=True)
    opposite = (torch.cat([s[:9], -s[:9]]), t[:18])
    yield Sample("opposite", opposite, cancels=True)
    yield Sample("opposite-jeffreys", opposite, {"divergence": "jeffreys"}, cancels=True)


def magnitude(sample: Sample) -> tuple[float, tuple[Tensor | None]]:
    """Terms of "kl" have both signs, and each is q times the logarithm of a rounded ratio.

    Of a cancelling sample also the size of the terms of the gradient, and how many times larger
    than that of 1 the rounding of a similarity is.
    """
    s, t = (x.double() for x in sample.args)
    kernel = sample.kwargs.get("kernel", "cosine")
    divergence = sample.kwargs.get("divergence", "kl")
    B, eps = max(len(s), 1), reference.LOG_EPS[divergence]
    k_s, z_s, condition_s = _similarities(s, kernel, divergence)
    k_t, z_t, condition_t = _similarities(t, kernel, divergence)
    p, q = k_s / z_s, k_t / z_t
    ratio = (q + eps) / (p + eps)
    terms = q * (1 + ratio.log().abs()) if divergence == "kl" else (p + q) * ratio.log().abs()
    if not sample.cancels:
        return terms.sum().item() / B**2, (None,)
    condition = condition_s + condition_t
    loss = ((terms + p + q) * condition).sum().item() / B**2
    slope = (1 + ratio) * condition
    gk = (slope + (p * slope).sum(1, keepdim=True)) / z_s
    gk = gk + gk.mT
    if kernel == "student_t":
        difference = (s[:, None] - s).abs()
        d = (difference.square().sum(2) + reference.DISTANCE_EPS).sqrt()
        return loss, ((gk * k_s.square() / d)[:, :, None].mul(difference).sum(1) / B**2,)
    norm, u = s.norm(dim=1, keepdim=True), F.normalize(s, dim=1).abs()
    gradient = (gk.sum(1, keepdim=True) * u + gk @ u) / 2 / B**2
    return loss, (gradient / (norm + reference.NORM_EPS[divergence]),)


def _similarities(x: Tensor, kernel: str, divergence: str) -> tuple[Tensor, ...]:
    """(K, Z, condition of K)"""
    if kernel == "cosine":
        _, k, z = reference._cosine(x, reference.NORM_EPS[divergence])
        return k, z, 1 + 1 / k
    d2, k, z = reference._student_t(x)
    # of rows that are not close products may leave d^2 off by 16 roundings: docs/numerics.md
    return k, z, 1 + 8 * (d2 + reference.DISTANCE_EPS).sqrt() * k


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    yield from _two_sides.bad_inputs(device)
    x = torch.ones(8, 4, device=device)
    yield _two_sides.bad("kernel", (x, x), ValueError, "kernel must be one of", kernel="rbf")
    yield _two_sides.bad(
        "divergence", (x, x), ValueError, "divergence must be one of", divergence="js"
    )


def _shape(name: str, B: int, D: int, workload: str, **kwargs: Any) -> BenchShape:
    return BenchShape(name, {"B": B, "D": D}, workload, kwargs)


BENCH = (
    _shape("small", 64, 128, "pooled features of a small network, the CIFAR batch"),
    _shape("pooled", 256, 512, "pooled ResNet-18/34 features, the ImageNet batch"),
    _shape("embeddings", 4096, 128, "large-batch metric learning"),
    _shape(
        "flow", 4096, 128, "the other kernel and divergence at large batch",
        kernel="student_t", divergence="jeffreys",
    ),
    _shape("huge", 32768, 128, "a batch whose matrices need over 30 GB in eager mode"),
)  # fmt: skip


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    B, D = shape.sizes["B"], shape.sizes["D"]
    args = tuple(randn(B, D, seed=seed, device=device, dtype=dtype) for seed in (1, 2))
    return Sample(shape.name, args, dict(shape.kwargs))


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Two symmetric products, which count half, and one of weights with rows; both sides read once,
    the gradient written."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    return Cost(flops=4.0 * B * B * D, bytes=3.0 * B * D * dtype.itemsize)


def _eager(sample: Sample) -> Callable[..., Tensor]:
    """As in the public codes, with squared distances from a product."""

    def squared_distances(x: Tensor) -> Tensor:
        squares = x.square().sum(1)
        d2 = (squares[:, None] + squares - 2 * (x @ x.T)).clamp_min(0)
        return d2 * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        options = {"kernel": "cosine", "divergence": "kl"} | sample.kwargs
        return reference.by_distances(
            student, teacher.detach(), **options, squared_distances=squared_distances
        )

    return call


def _losses_of_rows(sample: Sample, rows: Tensor) -> Tensor:  # [R]
    """Sums of the divergence's terms; each row has a normaliser of its own."""
    divergence = sample.kwargs.get("divergence", "kl")
    if sample.kwargs.get("kernel", "cosine") != "cosine":
        raise ValueError(f"sample must have the kernel 'cosine', got {sample.kwargs}")

    def probabilities(x: Tensor) -> Tensor:  # [R, B]
        u = x / (norms(x, keepdim=True) + reference.NORM_EPS[divergence])
        k = (u[rows] @ u.T + 1) / 2
        return k / k.sum(1, keepdim=True)

    p, q = (probabilities(x) for x in sample.args)
    return reference.terms_of(p, q, divergence).sum(1)


EAGER_MATRICES = 9  # B x B, that the definition with autograd holds at its peak, and some room


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    B, D = shape.sizes["B"], shape.sizes["D"]
    if variant == "mm":
        return B * B * dtype.itemsize
    if variant in ("eager", "compile", "reference"):
        return EAGER_MATRICES * B * B * dtype.itemsize
    return 6.0 * B * D * 4


OPINFOS = [
    OpInfo(
        name="pkt",
        op="pkt",
        function=pkt,
        definition=definitions.pkt,
        diff_args=("student",),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        magnitude=magnitude,
        subtracts=True,
        memory=memory,
        eager=Eager(_eager, prepare=lambda sample: sample),
        by_rows=ByRows(_losses_of_rows, divisor=lambda losses: len(losses) ** 2),
        algorithm_options=(),
    )
]
