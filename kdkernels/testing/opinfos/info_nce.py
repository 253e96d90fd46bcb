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
from kdkernels.reference import _relational_kl as reference
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
    yield from _samples_of_positives(device, draw)
    x, q, y = draw(46, 12, 35)
    yield Sample("strided", (x.T.contiguous().T[::2], q.T.contiguous().T, y[::2]))
    yield Sample("empty", draw(0, 4, 6))


def _samples_of_positives(
    device: torch.device, draw: Callable[[int, int, int], tuple[Tensor, ...]]
) -> Iterator[Sample]:
    """With several positives, with some that are not in the bank, and with keys left out."""
    x, q, y = draw(21, 6, 37)
    i, labels = torch.arange(21, device=device), torch.arange(37, device=device) % 5
    mask = torch.rand(21, 37, generator=rng(6)).to(device) < 0.3
    mask[4] = True
    free = mask.clone()
    free[i, y] = False
    yield Sample("exclude", (x, q, y), {"exclude": (y + 1).int() % 37, "reduction": "none"})
    yield Sample("mask", (x, q, y), {"exclude": free})
    number = torch.tensor(30, device=device)
    yield Sample("own_keys", (x, q), {"own_keys": x.flip(0), "num_keys": number})
    options = {"own_keys": x.flip(1), "exclude": mask, "normalize": False, "reduction": "sum"}
    yield Sample("own_keys_mask", (x, q), options)
    # label 5 has no key
    options = {"key_labels": labels, "reduction": "none"}
    yield Sample("labels", (x, q, i % 6), options)
    q, y = x.clone(), (i % 6).int()
    yield Sample("labels_in_batch", (x, q, y), {"key_labels": y, "exclude": i, "temperature": 0.5})
    options = {"key_labels": y, "num_keys": torch.tensor(17, device=device), "exclude": i - 1}
    yield Sample("labels_num_keys", (x, q, y), options)
    options = {"key_labels": y, "own_keys": q.flip(1), "num_keys": 17, "exclude": mask[:, :21]}
    yield Sample("labels_own_keys_mask", (x, q, y), options)


def magnitude(sample: Sample) -> tuple[float, tuple[Tensor, ...]]:
    """As of relational_kl; the weights of several positives are rounded, too."""
    queries, keys, *positives = sample.args
    options = sample.kwargs
    q, size, row, key = bank.side(queries, keys, options.get("temperature", 0.07), options)
    share, labels = bank.share(sample), options.get("key_labels")
    weights = size[:, None] * q
    if labels is not None:
        out = reference.not_counting(*q.shape, q.device, options.get("exclude"))
        found = reference.positive_keys(*positives, labels, out).to(q.dtype)
        weights = weights + found / found.sum(-1, keepdim=True).clamp_min(1)
    return bank.most(size, sample), (share * size * row, share * (weights * key).sum(0))


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x, q = torch.ones(8, 4, device=device), torch.ones(12, 4, device=device)
    i = torch.arange(8, device=device)

    def bad(name: str, args: Any, error: type[Exception], message: str, **kw: Any) -> BadInput:
        return BadInput(name, args, kw, error, message)

    yield bad("one_dim", (x[0], q, i), ValueError, "queries must have at least 2 dimensions")
    yield bad("width", (x, q[:, :3], i), ValueError, "keys must have 4 columns like queries, got 3")
    yield bad("no_keys", (x, q[:0], i), ValueError, "keys must have at least 1 row")
    yield bad("no_positives", (x, q), ValueError, "positives must say which keys are positive")
    yield bad("own_keys", (x, q, i), ValueError, "positives must be None with own_keys", own_keys=x)
    own = {"own_keys": x[:7]}
    yield bad("own_keys_rows", (x, q), ValueError, "own_keys must have 8 rows like queries", **own)
    own = {"own_keys": x[:, :3]}
    yield bad("own_keys_width", (x, q), ValueError, "own_keys must have 4 columns", **own)
    labels = {"key_labels": i}
    yield bad("labels", (x, q, i), ValueError, "key_labels must have shape [12] like", **labels)
    labels = {"key_labels": q[:, 0]}
    yield bad("labels_dtype", (x, q, i), TypeError, "key_labels must be an integer", **labels)
    labels = {"key_labels": q[:, 0].long()}
    message = "positives must be the queries' labels with key_labels, got None"
    yield bad("labels_alone", (x, q), ValueError, message, **labels)
    mask = {"exclude": torch.zeros(8, 11, dtype=torch.bool, device=device)}
    yield bad("mask", (x, q, i), ValueError, "exclude must have shape [8, 12], a row per", **mask)
    yield bad("exclude", (x, q, i), ValueError, "exclude must have shape [8] like", exclude=i[:7])
    yield bad("exclude_dtype", (x, q, i), TypeError, "exclude must be an integer", exclude=x[:, 0])
    yield bad("positives_dtype", (x, q, x[:, 0]), TypeError, "positives must be an integer tensor")
    yield bad("positives_shape", (x, q, i[:7]), ValueError, "positives must have shape [8] like")
    if device.type == "cpu":
        yield bad("high", (x, q, i + 5), ValueError, "positives must be from 0 to 11, got 12")
        yield bad("low", (x, q, i - 1), ValueError, "positives must be from 0 to 11, got -1")
        few = {"num_keys": torch.tensor(7)}
        own = "exclude must leave each query its positive, got that of query 0"
        yield bad("excluded", (x, q, i), ValueError, own, exclude=i)
        beyond = "exclude must be from -1 to 11, got 12"
        yield bad("exclude_high", (x, q, i), ValueError, beyond, exclude=i + 5)
        mask = {"exclude": torch.ones(8, 12, dtype=torch.bool)}
        yield bad("all_masked", (x, q, i), ValueError, own, **mask)
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
    bank.shape("supcon", 4096, 128, 4096, "SupCon: 512 labels, each row among the keys itself"),
    bank.shape("huge_batch", 65536, 768, 65536, "in-batch negatives of CLIP's training", "cuda"),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    queries, keys = bank.bench_rows(shape, "BK", device, dtype)
    rows = torch.arange(len(queries), device=device)
    if shape.name == "supcon":
        labels = rows % 512
        return Sample(shape.name, (queries, keys, labels), {"key_labels": labels, "exclude": rows})
    return Sample(shape.name, (queries, keys, rows % len(keys)))


def _eager(sample: Sample) -> Callable[..., Tensor]:
    """As users write it, with unit keys."""
    if sample.name == "supcon":
        return _eager_supcon
    bank.without_options(sample)

    def of(queries: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
        return F.cross_entropy(F.normalize(queries, dim=-1) @ keys.mT / 0.07, positives)

    return of


def _eager_supcon(queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """Each query lies among the keys at its own place."""
    a = F.normalize(queries, dim=-1) @ keys.mT / 0.07
    self = torch.eye(len(a), dtype=torch.bool, device=a.device)
    log_q = a.masked_fill(self, -torch.inf).log_softmax(-1)
    positive = (labels[:, None] == labels) & ~self
    return -(log_q.masked_fill(~positive, 0.0).sum(-1) / positive.sum(-1)).mean()


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
        by_rows=bank.by_rows(definitions.info_nce, keys_at=1),
    ),
]
