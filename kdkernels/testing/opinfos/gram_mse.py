# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of gram_mse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels._similarity import NORM_EPS
from kdkernels.ops.gram_mse import choose_algorithm, gram_mse, weight_of_factored
from kdkernels.reference import _gram_mse as reference
from kdkernels.testing.opinfo import (
    BadInput,
    BenchShape,
    Cost,
    OpInfo,
    Sample,
    network_features,
    randn,
)

# (B, D_s, D_t); B above and below the widths, so that resident, streamed and factored all come up
SHAPES = {
    "tiny": (2, 3, 1),
    "aligned": (64, 32, 32),
    "ragged_rows": (67, 32, 16),
    "ragged_cols": (32, 37, 53),
    "ragged_all": (71, 13, 29),
    "one_row": (1, 7, 5),
    "one_col": (19, 1, 1),
    "wide": (7, 211, 173),
}
FORMS: tuple[dict[str, Any], ...] = (
    {"normalize": "row_l2", "algorithm": "tiled"},
    {"normalize": "row_l2", "algorithm": "factored"},
    {"normalize": "row_l1"},
    {"normalize": "feature", "algorithm": "tiled"},
    {"normalize": "feature", "algorithm": "factored"},
    {"normalize": "none", "algorithm": "tiled"},
    {"normalize": "none", "algorithm": "factored"},
    {"normalize": "feature", "kernel": "rbf_taylor"},
    {"normalize": "none", "kernel": "rbf_taylor", "gamma": 0.1, "order": 3},
)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(*shape: int, seed: int) -> Tensor:
        return randn(*shape, seed=seed, device=device, dtype=dtype)

    def pair(B: int, D_s: int, D_t: int) -> tuple[Tensor, Tensor]:
        return draw(B, D_s, seed=1) / D_s**0.25, draw(B, D_t, seed=2) / D_t**0.25

    for name, shape in SHAPES.items():
        # a single row normalises to 1 on both sides
        yield Sample(name, pair(*shape), cancels=name == "one_row")
    for form in FORMS:
        label = "-".join(str(value) for value in form.values())
        yield Sample(f"{label}-wide", pair(9, 17, 23), form)
        yield Sample(f"{label}-tall", pair(83, 11, 5), form)
    s, t = pair(46, 12, 20)
    yield Sample("strided", (s.T.contiguous().T[::2], torch.cat([t, t], 1)[:23, ::2]))
    grouped = draw(2, 3, 21, 10, seed=3), draw(2, 3, 21, 14, seed=4)
    for reduction in ("mean", "sum", "none"):
        yield Sample(f"groups-{reduction}", grouped, {"reduction": reduction})
    yield Sample("groups-factored", grouped, {"algorithm": "factored"})
    yield Sample("empty", pair(0, 4, 6))
    yield Sample("no_features", (draw(5, 0, seed=5), draw(5, 0, seed=6)))
    large = 1e4 if dtype in (torch.float32, torch.float64) else 30.0
    yield Sample("large", (s * large, t * large))
    yield Sample("relu", (F.relu(s), F.relu(t)))
    for algorithm in ("tiled", "factored"):
        yield Sample(f"same-{algorithm}", (t, t.clone()), {"algorithm": algorithm}, cancels=True)
        near = t + 0.01 * draw(*t.shape, seed=7)
        yield Sample(f"near-{algorithm}", (near, t), {"algorithm": algorithm}, cancels=True)
        all_equal = (s[:1].expand(31, -1), t[:1].expand(31, -1))
        yield Sample(f"all_equal-{algorithm}", all_equal, {"algorithm": algorithm}, cancels=True)
    yield from _network_samples(device, dtype)


def _network_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Features that share a mean, and a student on the way to its teacher: both Grams agree to most
    of their digits. Not marked `cancels`, since the definition is right in fp32.

    fp64 is marked, since nothing wider accumulates it. In 16 bits a distance below some units in
    the last place is rounding, and fp16 has no gradient as small as that of a mean.
    """
    distances = [d for d in (1e-1, 1e-2, 1e-3, 1e-4) if d >= 4 * torch.finfo(dtype).eps]
    last = distances[-1]

    def sample(
        name: str, shape: tuple[int, ...], distance: float, options: dict[str, Any], **kwargs: float
    ) -> Sample:
        student, teacher = (
            network_features(*shape, seed=8, device=device, dtype=dtype, distance=d, **kwargs)
            for d in (distance, 0.0)
        )
        cancels = dtype == torch.float64
        return Sample(f"network-{name}", (student, teacher), options, cancels=cancels)

    # The loss of one group of rows may be right in plain torch by luck; hardly that of all sixteen.
    for form in FORMS if dtype != torch.float16 else ():
        label = "-".join(str(value) for value in form.values())
        options = {**form, "reduction": "none"}
        for distance in distances:
            yield sample(f"{label}-{distance:g}", (16, 32, 8), distance, options)
        if form.get("algorithm") != "factored":
            yield sample(f"{label}-resident", (16, 9, 15), last, options)
    total = {"reduction": "sum"}
    yield sample("sparse", (160, 16), last, total, offset=0.0, spread=1.0)
    yield sample("unrelated", (160, 24), 0.3, total)
    if dtype.itemsize > 2:
        yield sample("256x64", (256, 64), 1e-2, total)
        yield sample("512x64", (512, 64), last, total)


def magnitude(sample: Sample) -> tuple[float, tuple[float, ...]]:
    """Size of the two Grams that the loss subtracts, and of the terms that the gradients sum."""
    s, t = (x.double() for x in sample.args)
    names = ("normalize", "kernel", "gamma", "order")
    options = {name: value for name, value in sample.kwargs.items() if name in names}
    normalize = options.get("normalize", "row_l2")
    B = max(s.shape[-2], 1)
    scale = 1.0 if sample.kwargs.get("reduction") == "sum" else 1.0 / B**2
    units = [F.normalize(x, dim=-1) if normalize == "feature" else x for x in (s, t)]
    gram_s, gram_t = (reference.gram(x, **options) for x in (s, t))
    size = (gram_s.square().sum() + gram_t.square().sum()).item() * scale

    def gradient(x: Tensor, unit: Tensor) -> float:
        """Of the terms w_ij x_j, w = 2 (|G_s| + |G_t|) times the derivative of G."""
        gram = unit @ unit.mT
        slope: Any = torch.ones_like(gram)
        if options.get("kernel") == "rbf_taylor":
            c = reference.taylor_coefficients(options.get("gamma", 0.4), options.get("order", 2))
            slope = sum(p * c[p] * gram ** (p - 1) for p in range(1, len(c)))
        if normalize in ("row_l2", "row_l1"):
            norm = gram.norm(p=int(normalize[-1]), dim=-1, keepdim=True)
            slope = slope / norm.clamp_min(NORM_EPS)
        half = 2 * scale * (gram_s.abs() + gram_t.abs()) * slope.abs()
        terms = (half + half.mT) @ unit.abs()
        if normalize == "feature":
            terms = terms / x.norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)
        return terms.max().item()

    return size, (gradient(s, units[0]), gradient(t, units[1]))


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x = torch.ones(8, 4, device=device)

    def bad(
        name: str, args: tuple[Any, ...], error: type[Exception], message: str, **kwargs: Any
    ) -> BadInput:
        return BadInput(name, args, kwargs, error, message)

    yield bad("rows", (x, x[:7]), ValueError, "teacher must have 8 rows like student, got 7")
    yield bad(
        "one_dim",
        (x[0], x[0]),
        ValueError,
        "student must have at least 2 dimensions, got shape [4]",
    )
    yield bad(
        "dims", (x, x[None]), ValueError, "teacher must have 2 dimensions like student, got 3"
    )
    yield bad(
        "groups",
        (x.expand(2, 8, 4), x.expand(3, 8, 4)),
        ValueError,
        "teacher must have the leading dimensions [2]",
    )
    yield bad(
        "integer",
        (x.long(), x.long()),
        TypeError,
        "student must be float16, bfloat16, float32 or float64",
    )
    yield bad("not_tensor", (x, [[1.0]]), TypeError, "teacher must be a torch.Tensor, got list")
    yield bad(
        "devices",
        (x, x.to("meta")),
        ValueError,
        f"teacher must be on {x.device} like student, got meta",
    )
    yield bad("normalize", (x, x), ValueError, "normalize must be one of", normalize="l2")
    yield bad("kernel", (x, x), ValueError, "kernel must be one of", kernel="rbf")
    yield bad("algorithm", (x, x), ValueError, "algorithm must be one of", algorithm="fast")
    yield bad("reduction", (x, x), ValueError, "reduction must be one of", reduction="batchmean")
    yield bad(
        "no_factors_l1",
        (x, x),
        ValueError,
        "algorithm must be",
        normalize="row_l1",
        algorithm="factored",
    )
    rbf: dict[str, Any] = {"kernel": "rbf_taylor", "normalize": "feature"}
    yield bad(
        "no_factors_rbf", (x, x), ValueError, "algorithm must be", algorithm="factored", **rbf
    )
    yield bad(
        "rbf_of_rows",
        (x, x),
        ValueError,
        "normalize must be 'feature' or 'none'",
        kernel="rbf_taylor",
    )
    yield bad(
        "gamma",
        (x, x),
        ValueError,
        "gamma must be a positive finite number, got nan",
        gamma=float("nan"),
        **rbf,
    )
    yield bad(
        "gamma_type", (x, x), TypeError, "gamma must be a number, got str", gamma="0.4", **rbf
    )
    yield bad("order", (x, x), ValueError, "order must be from 1 to 8, got 0", order=0, **rbf)
    yield bad("backend", (x, x), ValueError, "backend must be one of", backend="gpu")


def _shape(name: str, B: int, D: int, workload: str, device: str | None = None) -> BenchShape:
    return BenchShape(name, {"B": B, "D": D}, workload, device=device)


EAGER_GRAMS = 7  # that the definition with autograd holds at its peak, and some room
BENCH = (
    _shape("small", 64, 128, "pooled features of a small network, the CIFAR batch"),
    _shape(
        "resnet32x4", 64, 16384, "RepDistiller's CIFAR-100 setting: the last map 256x8x8, flattened"
    ),
    _shape("layer4", 256, 25088, "ImageNet layer4 of ResNet-18/34, 512x7x7, flattened"),
    _shape("square", 2048, 2048, "pooled ResNet-50 features where neither algorithm has an edge"),
    _shape("embeddings", 8192, 128, "large-batch metric learning"),
    _shape("pooled", 8192, 512, "pooled ResNet-18/34 features at large batch"),
    _shape(
        "pooled_relu",
        8192,
        512,
        "the same after a ReLU, with a student near its teacher: its factors are fp64",
    ),
    _shape("huge", 65536, 256, "a batch whose Grams would need over 50 GB in eager mode"),
    _shape("pooled_2048", 8192, 2048, "pooled ResNet-50 features at large batch", "cuda"),
    _shape(
        "huge_512",
        65536,
        512,
        "pooled ResNet-18/34 features of a batch gathered over many GPUs",
        "cuda",
    ),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    B, D = shape.sizes["B"], shape.sizes["D"]
    if shape.name == "pooled_relu":
        sides = [
            network_features(B, D, seed=1, device=device, dtype=dtype, distance=distance)
            for distance in (0.1, 0.0)
        ]
    else:
        sides = [randn(B, D, seed=seed, device=device, dtype=dtype) for seed in (1, 2)]
    return Sample(shape.name, tuple(sides), dict(shape.kwargs))


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Fewest operations over the algorithms (a symmetric product counts half) and one read of each
    input, one write."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    multiply_adds = min(2 * B * B * D if B <= D else 3 * B * B * D, 9.5 * B * D * D)
    return Cost(flops=2.0 * multiply_adds, bytes=4.0 * B * D * dtype.itemsize)


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    """B x B matrices alive at once, in the dtype that a variant computes in, and room for the
    factors."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    if variant == "mm":
        return B * B * dtype.itemsize
    if variant in ("eager", "compile"):
        return EAGER_GRAMS * B * B * dtype.itemsize
    narrow = dtype.itemsize == 2
    acc = 8 if dtype == torch.float64 else 4
    chosen = choose_algorithm(
        B,
        D,
        D,
        normalize="row_l2",
        kernel="linear",
        algorithm=shape.kwargs.get("algorithm", "auto"),
        factored_counts=weight_of_factored(dtype, torch.device(shape.device or "cpu"), variant),
    )
    if chosen == "factored":
        wide = acc if narrow else 8  # the reference copies features to fp64, kernels some of them
        return 8 * B * D * (wide if variant == "reference" else acc) + 6 * D * D * wide
    grams = EAGER_GRAMS if variant == "reference" else 2 if chosen == "resident" else 0
    return (grams * B * B + 4 * B * D) * acc


OPINFOS = [
    OpInfo(
        name="gram_mse",
        op="gram_mse",
        function=gram_mse,
        definition=definitions.gram_mse,
        diff_args=("student", "teacher"),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        magnitude=magnitude,
        memory=memory,
    )
]
