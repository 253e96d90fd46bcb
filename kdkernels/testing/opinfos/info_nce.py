# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of info_nce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.info_nce import info_nce
from kdkernels.testing.opinfo import (
    BadInput,
    BenchShape,
    Cost,
    Eager,
    OpInfo,
    Product,
    Sample,
    rng,
)  # fmt: skip
from kdkernels.testing.opinfos import _key_bank as bank


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(B: int, D: int, K: int) -> tuple[Tensor, ...]:
        queries, _, keys, _ = bank.draw(B, D, D, K)
        positives = torch.randint(K, (B,), generator=rng(5))
        return queries.to(device, dtype), keys.to(device, dtype), positives.to(device)

    for name, shape in bank.SHAPES.items():
        yield Sample(name, draw(*shape))
    options = {"normalize": False, "temperature": 1.3, "reduction": "none"}
    yield Sample("one_col", draw(19, 1, 9), options)
    x, q, y = draw(13, 6, 19)
    options = {"num_keys": torch.tensor(11, device=device), "reduction": "sum"}
    yield Sample("num_keys", (x, q, y.int() % 11), options)
    yield Sample("sharp", draw(41, 32, 96), {"temperature": 0.001})
    x, q, y = draw(46, 12, 35)
    yield Sample("strided", (x.T.contiguous().T[::2], q.T.contiguous().T, y[::2]))
    yield Sample("empty", draw(0, 4, 6))


def magnitude(sample: Sample) -> tuple[float, tuple[Tensor, ...]]:
    queries, keys, _ = sample.args
    temperature = sample.kwargs.get("temperature", 0.07)
    q, size, row, key = bank.side(queries, keys, temperature, sample.kwargs)
    share = bank.share(sample)
    return bank.most(size, sample), (share * size * row, share * (size[:, None] * q * key).sum(0))


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x, q = torch.ones(8, 4, device=device), torch.ones(12, 4, device=device)
    i = torch.arange(8, device=device)

    def bad(name: str, args: Any, error: type[Exception], message: str, **kw: Any) -> BadInput:
        return BadInput(name, args, kw, error, message)

    yield bad("one_dim", (x[0], q, i), ValueError, "queries must have at least 2 dimensions")
    yield bad("width", (x, q[:, :3], i), ValueError, "keys must have 4 columns like queries, got 3")
    yield bad("no_keys", (x, q[:0], i), ValueError, "keys must have at least 1 row")
    yield bad("positives_dtype", (x, q, x[:, 0]), TypeError, "positives must be an integer tensor")
    yield bad("positives_shape", (x, q, i[:7]), ValueError, "positives must have shape [8] like")
    if device.type == "cpu":
        yield bad("high", (x, q, i + 5), ValueError, "positives must be from 0 to 11, got 12")
        yield bad("low", (x, q, i - 1), ValueError, "positives must be from 0 to 11, got -1")
        few = {"num_keys": torch.tensor(7)}
        yield bad("beyond", (x, q, i), ValueError, "positives must be from 0 to 6, got 7", **few)
    for name, value, error, message in bank.bad_num_keys(q):
        yield bad(f"num_keys_{name}", (x, q, i), error, message, num_keys=value)
    for name, value, error, message in bank.bad_temperatures("temperature"):
        yield bad(f"temperature_{name}", (x, q, i), error, message, temperature=value)
    yield bad("normalize", (x, q, i), TypeError, "normalize must be True or False", normalize=1)
    yield bad("reduction", (x, q, i), ValueError, "reduction must be one of", reduction="max")
    yield bad("backend", (x, q, i), ValueError, "backend must be one of", backend="gpu")


BENCH = (
    bank.shape("in_batch", 1024, 128, 1024, "in-batch negatives: small enough for eager mode"),
    bank.shape("moco", 256, 128, 65536, "the queue of MoCo and of DisCo"),
    bank.shape("huge_batch", 65536, 768, 65536, "in-batch negatives of CLIP's training", "cuda"),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    queries, keys = bank.bench_rows(shape, "BK", device, dtype)
    positives = torch.arange(len(queries), device=device) % len(keys)
    return Sample(shape.name, (queries, keys, positives))


def _eager(sample: Sample) -> Callable[..., Tensor]:
    """As users write it, with unit keys."""
    bank.without_options(sample)

    def of(queries: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
        return F.cross_entropy(F.normalize(queries, dim=-1) @ keys.mT / 0.07, positives)

    return of


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    return bank.cost_of(shape, dtype, sides=1)


OPINFOS = [
    OpInfo(
        name="info_nce",
        op="relational_kl",
        function=info_nce,
        definition=definitions.info_nce,
        diff_args=("queries", "keys"),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        eager=Eager(_eager, bank.with_unit_keys(1)),
        product=Product(bank.two_products, lambda q, keys, _: 4.0 * q.numel() * len(keys)),
        magnitude=magnitude,
        subtracts=True,
        memory=bank.memory,
    ),
]
