# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of triplet_distillation with mined negatives.

Random negatives differ from draw to draw: tests/test_triplet_distillation.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.triplet_distillation import triplet_distillation
from kdkernels.reference._distances import distances
from kdkernels.testing.opinfo import BadInput, BenchShape, Cost, OpInfo, Sample, randn, rng
from kdkernels.testing.opinfos import _labelled


def contested(sample: Sample) -> Tensor:  # [B]
    """Which rows of the student could be the nearest of another class in place of others."""
    student, teacher, labels = sample.args
    d = distances(teacher.double(), student.double(), "euclidean")
    return _labelled.near_best(d, labels[:, None] != labels[None]).any(0)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def batch(B: int, D: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.randint(classes, (B,), generator=rng(1)) - 2
        s, t = (randn(B, D, seed=seed, device=device, dtype=dtype) for seed in (1, 2))
        return s, t, labels.to(device)

    for name, shape in _labelled.SHAPES.items():
        yield Sample(name, batch(*shape), {"negatives": "hardest"})
    for name in ("ragged_all", "wide"):
        yield Sample(f"semihard-{name}", batch(*_labelled.SHAPES[name]), {"negatives": "semihard"})
    s, t, y = batch(46, 24, 5)
    hardest = {"negatives": "hardest", "margin": 0.5}
    yield Sample("strided", (s[::2, ::2], t.T.contiguous().T[::2, ::2], y[::2]), hardest)
    yield Sample("one_class", (s, t, torch.zeros_like(y)), hardest)
    yield Sample("empty", batch(0, 4, 1), hardest)


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x, y = torch.ones(8, 4, device=device), torch.arange(8, device=device) // 2

    def bad(name: str, args: Any, error: type[Exception], message: str, **kw: Any) -> BadInput:
        return BadInput(name, args, kw, error, message)

    yield bad("rows", (x, x[:7], y), ValueError, "teacher must have shape [8, 4] like student")
    yield bad("widths", (x, x[:, :3], y), ValueError, "teacher must have shape [8, 4]")
    yield bad("float_labels", (x, x, y.float()), TypeError, "labels must be an integer tensor")
    yield bad("label_count", (x, x, y[:7]), ValueError, "labels must have shape [8]")
    yield bad("margin", (x, x, y), ValueError, "margin must be", margin=-1.0)
    yield bad("negatives", (x, x, y), ValueError, "negatives must be one of", negatives="easy")
    yield bad("generator", (x, x, y), TypeError, "generator must be a torch.Gen", generator=0)
    yield bad("backend", (x, x, y), ValueError, "backend must be one of", backend="gpu")


BENCH = (
    BenchShape(
        "logits",
        {"B": 4096, "D": 100, "classes": 100},
        "CIFAR-100 logits at large batch",
        {"negatives": "hardest"},
    ),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    B, D, classes = (shape.sizes[name] for name in ("B", "D", "classes"))
    labels = torch.randperm(B, generator=rng(3)) % classes
    s, t = (randn(B, D, seed=seed, device=device, dtype=dtype) for seed in (1, 2))
    return Sample(shape.name, (s, t, labels.to(device)), dict(shape.kwargs))


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """One product of all pairs; one read of both sides, one write of the gradient."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    return Cost(flops=2.0 * B * B * D, bytes=3.0 * B * D * dtype.itemsize)


OPINFOS = [
    OpInfo(
        name="triplet_distillation",
        op="triplet",
        function=triplet_distillation,
        definition=definitions.triplet_distillation,
        diff_args=("student",),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        memory=_labelled.memory(6),
        algorithm_options=(),
        selects=True,
        contested=contested,
    )
]
