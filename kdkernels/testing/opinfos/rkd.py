# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of rkd_distance and rkd_angle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.rkd import rkd_angle, rkd_distance
from kdkernels.reference import _rkd as reference
from kdkernels.reference._distances import distances
from kdkernels.testing.opinfo import BadInput, BenchShape, Cost, Eager, OpInfo, Sample, randn

# B, D_s, D_t
SHAPES = {
    "tiny": (5, 3, 4),
    "aligned": (16, 16, 32),
    "ragged_rows": (19, 16, 16),
    "ragged_cols": (16, 19, 23),
    "ragged_all": (18, 13, 29),
    "one_row": (1, 23, 17),
    "wide": (7, 211, 5),
}


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(B: int, D_s: int, D_t: int) -> tuple[Tensor, Tensor]:
        s, t = (
            randn(B, D, seed=seed, device=device, dtype=dtype) for seed, D in ((1, D_s), (2, D_t))
        )
        return s, t

    for name, shape in SHAPES.items():
        yield Sample(name, draw(*shape))
    s, t = draw(22, 24, 20)
    yield Sample("strided", (s[::2, ::2], t.T.contiguous().T[::2, ::2]))
    s, t = draw(9, 6, 5)
    yield Sample("same", (s, s.clone()), cancels=True)
    yield Sample("coincident", (s[torch.arange(9) // 2], t))
    yield Sample("large", (s * (30.0 if dtype == torch.float16 else 1e4), t))
    yield Sample("one_col", (s[:, :1], t[:, :1]), cancels=True)  # every cosine is 1 or -1
    yield Sample("empty", (s[:0], t[:0]))
    yield Sample("no_features", (s[:, :0], t[:, :0]))


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x = torch.ones(8, 4, device=device)

    def bad(name: str, args: Any, error: type[Exception], message: str, **kwargs: Any) -> BadInput:
        return BadInput(name, args, kwargs, error, message)

    floats = "must be float16, bfloat16, float32 or float64, got torch.int64"
    yield bad("rows", (x, x[:7]), ValueError, "teacher must have 8 rows like student, got 7")
    yield bad("one_dim", (x[0], x), ValueError, "student must have at least 2 dimensions")
    yield bad("three_dims", (x[None], x), ValueError, "student must have 2 dimensions, got shape")
    yield bad("teacher_dims", (x, x[None]), ValueError, "teacher must have 2 dimensions")
    yield bad("list", (x, [1.0]), TypeError, "teacher must be a torch.Tensor, got list")
    yield bad("integer", (x.long(), x), TypeError, f"student {floats}")
    message = f"teacher must be on {x.device} like student, got meta"
    yield bad("device", (x, x.to("meta")), ValueError, message)
    yield bad("backend", (x, x), ValueError, "backend must be one of", backend="gpu")


def _distances(x: Tensor) -> Tensor:
    return distances(x.double(), x.double(), "euclidean")


def distance_magnitude(sample: Sample) -> tuple[float | None, tuple[float, float]]:
    """h is around 1 on both sides, whatever their difference, and rounded relative to that. Each
    of B pairs moves a row by a unit vector times 2 / (B^2 mean distance)."""

    def gradient(x: Tensor) -> float:
        mean = _distances(x).sum(1).mean().item()  # times B, less one
        return 4 / mean if mean > 0 else 0.0

    s, t = sample.args
    return 1.0 if sample.cancels else None, (gradient(s), gradient(t))


def angle_magnitude(sample: Sample) -> tuple[float | None, tuple[float, float]]:
    """Likewise cosines. Each of B^2 pairs of other rows moves a row, as the vertex or an end, by
    unit vectors over their distances times 1 / B^3."""

    def gradient(x: Tensor) -> float:
        d = _distances(x)
        inverse = torch.where(d == 0, 0.0, 1 / d).sum(1)
        return 6 * inverse.max().item() / len(d) ** 2 if len(d) else 0.0

    s, t = sample.args
    return 1.0 if sample.cancels else None, (gradient(s), gradient(t))


def _shape(name: str, B: int, D: int, workload: str, device: str | None = None) -> BenchShape:
    return BenchShape(name, {"B": B, "D": D}, workload, device=device)


SMALL = _shape("small", 64, 128, "CIFAR-100 features at the batch of RepDistiller")
DISTANCE_BENCH = (
    SMALL,
    _shape("pooled_2048", 256, 2048, "pooled ResNet-50 features, the ImageNet batch"),
    _shape("square", 2048, 2048, "pooled ResNet-50 features at large batch"),
    _shape("embeddings", 8192, 128, "metric learning at large batch"),
)
ANGLE_BENCH = (
    SMALL,
    _shape("metric", 128, 512, "the authors' metric learning: batch 128, embeddings of 512"),
    _shape("pooled", 512, 512, "pooled ResNet-18/34 features, a batch of 512"),
    _shape("large", 2048, 256, "embeddings at a batch that eager mode cannot hold"),
    _shape("pooled_1024", 1024, 512, "pooled ResNet-18/34 features, a batch of 1024", "cuda"),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    B, D = shape.sizes["B"], shape.sizes["D"]
    s, t = (randn(B, D, seed=seed, device=device, dtype=dtype) for seed in (1, 2))
    return Sample(shape.name, (s, t))


def eager_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances from products, a mean of those above 0, and smooth L1, as in RepDistiller."""

    def relative(x: Tensor) -> Tensor:
        squares = x.square().sum(1)
        d = (squares[:, None] + squares - 2 * x @ x.mT).clamp_min(1e-12).sqrt()
        d = d.masked_fill(torch.eye(len(d), dtype=torch.bool, device=d.device), 0.0)
        return d / d[d > 0].mean()

    with torch.no_grad():
        target = relative(teacher)
    return F.smooth_l1_loss(relative(student), target)


def eager_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Differences of all pairs [B, B, D], normalised, and a product for each row, as in
    RepDistiller."""

    def cosines(x: Tensor) -> Tensor:
        u = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(u, u.mT)

    with torch.no_grad():
        target = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), target)


def distance_cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Half of the products of each side's distances, and one product of the gradient."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    return Cost(flops=4.0 * B * B * D, bytes=3.0 * B * D * dtype.itemsize)


# Additions and multiplications of one triple: three distances to a cosine on each side, the loss,
# and sums for three derivatives.
TRIPLE_FLOPS = 24


def angle_cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """As for distances, and half of all triples."""
    cost, B = distance_cost(shape, dtype), shape.sizes["B"]
    return Cost(flops=cost.flops + TRIPLE_FLOPS / 2 * B**3, bytes=cost.bytes)


SLOW = ("eager", "compile")


def distance_memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    B, D = shape.sizes["B"], shape.sizes["D"]
    acc = max(dtype.itemsize, 4)
    if variant == "mm":
        return B * B * dtype.itemsize
    squares = {"reference": 12, "eager": 10, "compile": 10}.get(variant, 0)
    return (squares * B * B + 16 * B * D) * acc


def angle_memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    B, D = shape.sizes["B"], shape.sizes["D"]
    if variant == "mm":
        return B * B * dtype.itemsize
    if variant in SLOW:
        return (6 * B * B * D + 3 * B**3) * max(dtype.itemsize, 4)
    angles = 20 * max(B * B, reference.CHUNK) if variant == "reference" else 0
    return (angles + 10 * B * B + 8 * B * D) * 8


def _info(function: Callable[..., Tensor], **different: Any) -> OpInfo:
    return OpInfo(
        name=function.__name__,
        op="rkd",
        function=function,
        definition=getattr(definitions, function.__name__),
        diff_args=("student", "teacher"),
        samples=samples,
        bad_inputs=bad_inputs,
        bench_sample=bench_sample,
        **different,
    )


OPINFOS = [
    _info(
        rkd_distance,
        bench=DISTANCE_BENCH,
        cost=distance_cost,
        magnitude=distance_magnitude,
        subtracts=True,
        memory=distance_memory,
        eager=Eager(lambda _: eager_distance, lambda sample: sample),
    ),
    _info(
        rkd_angle,
        bench=ANGLE_BENCH,
        cost=angle_cost,
        magnitude=angle_magnitude,
        subtracts=True,
        memory=angle_memory,
        eager=Eager(lambda _: eager_angle, lambda sample: sample),
    ),
]
