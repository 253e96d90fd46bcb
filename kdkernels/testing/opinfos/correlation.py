# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of correlation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.correlation import correlation
from kdkernels.reference import _correlation as reference
from kdkernels.testing.opinfo import BadInput, BenchShape, Cost, OpInfo, Sample, randn
from kdkernels.testing.opinfos import _two_sides

SHAPES = {  # B, C
    "tiny": (2, 3),
    "aligned": (16, 32),
    "ragged_rows": (67, 8),
    "ragged_cols": (16, 37),
    "ragged_all": (37, 19),
    "one_row": (1, 7),
    "one_col": (19, 1),
    "wide": (5, 83),
}
FORMS: tuple[dict[str, Any], ...] = (
    {"temperature": 4.0, "centered": False},
    {"temperature": 0.7, "row_weight": 0.3, "column_weight": 2.0, "eps": 1e-6},
)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def pair(B: int, C: int) -> tuple[Tensor, Tensor]:
        return tuple(randn(B, C, seed=seed, device=device, dtype=dtype) * 2 for seed in (1, 2))

    for name, shape in SHAPES.items():
        # of one row or two, correlations within columns are 0 or 1; one column is all ones
        yield Sample(name, pair(*shape), cancels=name in ("one_row", "tiny", "one_col"))
    s, t = pair(46, 20)
    yield Sample("strided", (s.T.contiguous().T[::2], torch.cat([t, t], 1)[:23, ::2]))
    yield Sample("few", pair(5, 6))
    yield Sample("empty", pair(0, 4))
    yield Sample("no_classes", pair(4, 0))
    for form in FORMS:
        label = "-".join(map(str, form.values()))
        yield Sample(label, pair(9, 11), form)
        yield Sample(f"{label}-tall", pair(43, 13), form)
    s, t = s[:23], t[:23]
    yield Sample("confident", (s * 30, t * 30), cancels=True)
    yield Sample("near", (s + 0.01 * t, s), cancels=True)
    yield from _ruled_out(pair(6, 83))
    yield Sample("equal_rows", (s[:1].expand(21, -1), t[:1].expand(21, -1)), cancels=True)


def _ruled_out(sides: tuple[Tensor, Tensor]) -> Iterator[Sample]:
    """Minus infinity in blocks of classes, as vocabulary masks and heads that grow put it there."""

    def without(name: str, *out: Tensor, cancels: bool = False) -> Sample:
        masked = zip(sides, (out * 2)[:2], strict=True)
        args = tuple(x.masked_fill(where, -torch.inf) for x, where in masked)
        return Sample(name, args, cancels=cancels)

    B, C = sides[0].shape
    row, column = (torch.arange(n, device=sides[0].device) for n in (B, C))
    row = row[:, None]
    yield without("first_ruled_out", (column < C - 13).expand(B, C))
    yield without("last_ruled_out", (column >= 13).expand(B, C))
    yield without("blocks_ruled_out", column < row * C // B, column >= (row + 1) * C // B)
    yield without("all_but_one", column != C - 1 - row, column != 2 * row, cancels=True)


def magnitude(sample: Sample) -> tuple[float, tuple[Tensor]]:
    """Size of the ones that the correlations are taken from, and of the terms of the gradient: a
    probability is rounded relative to itself, and not to its distance from the mean."""
    options = {"temperature": 1.0, "row_weight": 1.0, "column_weight": 1.0, "eps": 1e-8}
    options |= {"centered": True, **sample.kwargs}
    tau, (B, C) = options["temperature"], sample.args[0].shape
    y, t = (torch.softmax(x.double() / tau, 1) for x in sample.args)
    dy = torch.zeros_like(y)
    for dim, weight in ((1, options["row_weight"] / B), (0, options["column_weight"] / C)):
        a, b = (reference._centred(x, dim) if options["centered"] else x for x in (y, t))
        norm_a, norm_b = (x.norm(dim=dim, keepdim=True) for x in (a, b))
        den = norm_a * norm_b + options["eps"]
        rounded_a, rounded_b = (x.norm(dim=dim, keepdim=True) for x in (y, t))
        of_a = norm_b / torch.where(norm_a > 0, norm_a, 1.0) / den
        worse = 1 + (rounded_a * norm_b + rounded_b * norm_a) / den
        dy += weight * (y * of_a + t / den) * worse
    size = tau * y * (dy + (dy * y).sum(1, keepdim=True))
    return tau**2 * (options["row_weight"] + options["column_weight"]), (size,)


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    yield from _two_sides.bad_inputs(device)
    x, bad = torch.ones(8, 4, device=device), _two_sides.bad
    yield bad("columns", (x, x[:, :3]), ValueError, "teacher must have 4 columns like student")
    yield bad("temperature", (x, x), ValueError, "temperature must be a posit", temperature=0.0)
    yield bad("row_weight", (x, x), ValueError, "row_weight must be a finite", row_weight=-1.0)
    yield bad("column_weight", (x, x), TypeError, "column_weight must be a num", column_weight="1")
    yield bad("centered", (x, x), TypeError, "centered must be True or False", centered=1)
    yield bad("eps", (x, x), ValueError, "eps must be a positive finite number", eps=0.0)


def _shape(name: str, B: int, C: int, workload: str) -> BenchShape:
    return BenchShape(name, {"B": B, "C": C}, workload)


BENCH = (
    _shape("imagenet", 256, 1000, "ImageNet logits"),
    _shape("small", 64, 100, "CIFAR-100 logits"),
    _shape("large", 4096, 1000, "ImageNet logits at large batch"),
    _shape("pixels", 32768, 19, "the pixels of segmentation logits, Cityscapes classes"),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    B, C = shape.sizes["B"], shape.sizes["C"]
    args = tuple(randn(B, C, seed=seed, device=device, dtype=dtype) * 3 for seed in (1, 2))
    return Sample(shape.name, args, dict(shape.kwargs))


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Two exponentials and some twenty operations a pass and element; both sides read twice, the
    gradient written."""
    elements = shape.sizes["B"] * shape.sizes["C"]
    return Cost(flops=80.0 * elements, bytes=5.0 * elements * dtype.itemsize)


EAGER_TENSORS = 8  # B x C, that the definition with autograd holds at its peak


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    elements = shape.sizes["B"] * shape.sizes["C"]
    if variant in ("eager", "compile", "reference"):
        return EAGER_TENSORS * elements * dtype.itemsize
    return 4.0 * elements * dtype.itemsize


OPINFOS = [
    OpInfo(
        name="correlation",
        op="correlation",
        function=correlation,
        definition=definitions.correlation,
        diff_args=("student",),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        magnitude=magnitude,
        memory=memory,
        takes_minus_inf=True,
        baselines=("eager", "compile"),
        algorithm_options=(),
    )
]
