# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of pairwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.pairwise import METRICS, PRODUCTS, pairwise
from kdkernels.testing.opinfo import BadInput, BenchShape, Cost, Eager, OpInfo, Sample, randn

# (N, M or None for the rows of x alone, D), metric
SHAPES: dict[str, tuple[tuple[int, int | None, int], str]] = {
    "tiny": ((2, 3, 3), "cosine"),
    "aligned": ((64, None, 32), "euclidean"),
    "ragged_rows": ((37, 35, 16), "cosine"),
    "ragged_cols": ((32, 33, 37), "rbf"),
    "ragged_all": ((35, 41, 13), "euclidean"),
    "one_row": ((1, 5, 7), "cosine"),
    "wide": ((7, 9, 211), "cosine"),
}
GAMMA = 0.05  # of "rbf": values between 0 and 1 at the distances of these samples


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(*shape: int, seed: int) -> Tensor:
        return randn(*shape, seed=seed, device=device, dtype=dtype)

    def options(metric: str) -> dict[str, Any]:
        if metric == "cosine":
            return {}
        return {"metric": metric, "gamma": GAMMA} if metric == "rbf" else {"metric": metric}

    def pair(N: int, M: int | None, D: int) -> tuple[Tensor, ...]:
        return (draw(N, D, seed=1), *(() if M is None else (draw(M, D, seed=2),)))

    for name, (sizes, metric) in SHAPES.items():
        yield Sample(name, pair(*sizes), options(metric))
    for metric in METRICS:
        yield Sample(f"{metric}-in_batch", pair(35, None, 5), options(metric))
        # the smallest of a metric runs in every test: some of one kind, some of the other
        smaller = metric in ("dot", "sqeuclidean")
        yield Sample(f"{metric}-pair", pair(*((11, 13, 7) if smaller else (17, 23, 5))),
                     options(metric))  # fmt: skip
    x, y = pair(46, 29, 12)
    yield Sample("strided", (x.T.contiguous().T[::2], torch.cat([y, y], 1)[:, ::2]))
    for metric in ("cosine", "euclidean"):
        yield Sample(f"groups-{metric}", (draw(2, 3, 5, 4, seed=3), draw(2, 3, 7, 4, seed=4)),
                     options(metric))  # fmt: skip
    yield Sample("groups-in_batch", (draw(3, 9, 4, seed=3),), options("rbf"))
    yield Sample("empty", pair(0, 0, 4))
    yield Sample("one_in_batch", pair(1, None, 7), options("euclidean"), cancels=True)
    for metric in ("cosine", "euclidean", "rbf"):
        yield Sample(f"no_features-{metric}", (draw(5, 0, seed=5), draw(3, 0, seed=6)),
                     options(metric))  # fmt: skip
    # one cluster, far from 0: products alone would keep no digit of a distance
    x, y = (10 / 8**0.5 + 1e-3 * draw(n, 8, seed=seed) for n, seed in ((20, 7), (13, 8)))
    yield Sample("cluster-euclidean-in_batch", (x,), {"metric": "euclidean"}, cancels=True)
    yield Sample("cluster-sqeuclidean-pair", (x, y), {"metric": "sqeuclidean"}, cancels=True)
    yield Sample("cluster-rbf-pair", (x, y), {"metric": "rbf", "gamma": 6e4}, cancels=True)


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x = torch.ones(8, 4, device=device)

    def bad(
        name: str, args: tuple[Any, ...], error: type[Exception], message: str, **kwargs: Any
    ) -> BadInput:
        return BadInput(name, args, kwargs, error, message)

    yield bad("columns", (x, x[:, :3]), ValueError, "y must have 4 columns like x, got 3")
    yield bad("one_dim", (x[0],), ValueError, "x must have at least 2 dimensions, got shape [4]")
    yield bad("dims", (x, x[None]), ValueError, "y must have 2 dimensions like x, got 3")
    groups = (x.expand(2, 8, 4), x.expand(1, 8, 4))
    yield bad(
        "groups", groups, ValueError, "y must have the leading dimensions [2] like x, got [1]"
    )
    yield bad("integer", (x.long(),), TypeError, "x must be float16, bfloat16, float32 or float64")
    yield bad("not_tensor", (x, [[1.0]]), TypeError, "y must be a torch.Tensor, got list")
    yield bad("devices", (x, x.to("meta")), ValueError, f"y must be on {x.device} like x, got meta")
    yield bad("metric", (x,), ValueError, "metric must be one of", metric="manhattan")
    yield bad("gamma", (x,), ValueError, "gamma must be a positive finite number", gamma=0.0)
    yield bad("gamma_type", (x,), TypeError, "gamma must be a number, got str", gamma="1")
    yield bad("backend", (x,), ValueError, "backend must be one of", backend="gpu")


def _shape(
    name: str, B: int, D: int, metric: str, workload: str, device: str | None = None
) -> BenchShape:
    kwargs: dict[str, Any] = {"metric": metric}
    if metric == "rbf":
        kwargs["gamma"] = 1 / D
    return BenchShape(name, {"B": B, "D": D}, workload, kwargs, device)


BENCH = (
    *(
        _shape("small" if metric == "euclidean" else f"small_{metric}", 64, 128, metric,
               "pooled features of a small network, the CIFAR batch")
        for metric in ("euclidean", "dot", "cosine", "sqeuclidean", "rbf")
    ),
    _shape("distances", 4096, 256, "euclidean", "distances within a large batch"),
    _shape("cosines", 4096, 256, "cosine", "similarities within a large batch"),
    _shape("kernel", 4096, 256, "rbf", "a kernel matrix of a large batch"),
    _shape("gathered", 16384, 512, "euclidean", "a batch gathered over many GPUs", "cuda"),
)  # fmt: skip


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    x = randn(shape.sizes["B"], shape.sizes["D"], seed=1, device=device, dtype=dtype)
    return Sample(shape.name, (x,), dict(shape.kwargs))


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Half of the products of the values, by symmetry, and one product of the gradient; the
    matrix written once, its gradient and, of distances, it itself read once."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    matrices = 2 if shape.kwargs["metric"] in ("dot", "cosine") else 3
    return Cost(3.0 * B * B * D, (matrices * B * B + 3.0 * B * D) * dtype.itemsize)


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    """B x B matrices alive at once, and in the oracle's definition the differences of rows."""
    B, D = shape.sizes["B"], shape.sizes["D"]
    if dtype == torch.float64 and variant == "eager":
        return 4.0 * B * B * D * dtype.itemsize
    expanded = shape.kwargs["metric"] in ("sqeuclidean", "rbf")
    return (6.0 if expanded or variant != "eager" else 2.5) * B * B * max(dtype.itemsize, 4)


def _squared(x: Tensor) -> Tensor:
    norm = x.square().sum(-1)
    return (norm[:, None] + norm[None, :] - 2 * x @ x.mT).clamp_min(0)


def eager(sample: Sample) -> Callable[..., Tensor]:
    """What users write: `torch.cdist` for distances, the binomial expansion for their squares."""
    metric, gamma = sample.kwargs["metric"], sample.kwargs.get("gamma")

    def cosine(x: Tensor) -> Tensor:
        u = F.normalize(x, dim=-1)
        return u @ u.mT

    return {
        "dot": lambda x: x @ x.mT,
        "cosine": cosine,
        "euclidean": lambda x: torch.cdist(x, x),
        "sqeuclidean": _squared,
        "rbf": lambda x: torch.exp(-gamma * _squared(x)),
    }[metric]


OPINFOS = [
    OpInfo(
        name="pairwise",
        op="pairwise",
        function=pairwise,
        definition=definitions.pairwise,
        diff_args=("x", "y"),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        memory=memory,
        keeps_dtype=True,
        keeps_result=lambda sample: sample.kwargs.get("metric", "cosine") not in PRODUCTS,
        algorithm_options=(),
        peers=("torchmetrics", "scikit-learn", "pykeops"),
        eager=Eager(function=eager, prepare=lambda sample: sample),
    )
]
