# SPDX-License-Identifier: Apache-2.0
"""What the samples, bad inputs and workloads of relational_kl and info_nce share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels._similarity import NORM_EPS, similarities
from kdkernels.reference import _relational_kl as reference
from kdkernels.testing.opinfo import BenchShape, ByRows, Cost, Sample, randn

# (B, D, K); keys beyond one tile of a kernel, and numbers of them that fill none
SHAPES = {
    "tiny": (2, 3, 4),
    "aligned": (64, 32, 64),
    "ragged_rows": (67, 16, 32),
    "ragged_cols": (32, 37, 53),
    "ragged_all": (71, 13, 29),
    "one_row": (1, 7, 12),
    "one_key": (9, 5, 1),
    "wide": (7, 131, 67),
    "many_keys": (5, 3, 331),
}


def draw(B: int, D: int, E: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A student, a teacher (that resembles it where E = D), and keys around them for both sides."""
    cpu, double = torch.device("cpu"), torch.float64
    student = randn(B, D, seed=1, device=cpu, dtype=double)
    teacher = randn(B, E, seed=2, device=cpu, dtype=double)
    if E == D:
        teacher = student + 0.7 * teacher
    keys, teacher_keys = (randn(K, n, seed=3 + n, device=cpu, dtype=double) for n in (D, E))
    return student, teacher, keys, teacher_keys


def side(
    rows: Tensor, keys: Tensor, temperature: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In fp64: probabilities [B, K], sizes of the logits [B], and of d(logit) / d(row) [B] and
    d(logit) / d(key) [B, K] without their directions."""
    normalize, own = options.get("normalize", True), options.get("own_keys")
    K, keys = len(keys), reference.first(keys, options.get("num_keys"))
    rows, keys = rows.double(), keys.double()
    logits = similar = similarities(rows, keys, normalize)
    if own is not None:
        logits = torch.cat([logits, reference.own_similarities(rows, own, normalize)], 1)
    logits = logits / temperature
    sizes = logits.abs().amax(-1).clamp_min(1)
    out = reference.not_counting(*similar.shape, keys.device, options.get("exclude"))
    logits[:, : len(keys)].masked_fill_(out, -torch.inf)
    p = logits.softmax(-1)[:, : len(keys)]
    of_rows, of_keys = (x.norm(dim=-1) for x in (rows, keys))
    if normalize:
        by_row = 1 / of_rows.clamp_min(NORM_EPS)
        by_key = (1 / of_keys.clamp_min(NORM_EPS)).expand_as(p)
    else:
        by_row, by_key = of_keys.max().expand(len(rows)), of_rows[:, None].expand_as(p)
    p, by_key = (F.pad(x, (0, K - len(keys))) for x in (p, by_key / temperature))
    return p, sizes, by_row / temperature, by_key


def share(sample: Sample) -> float:
    """Of one row in the loss."""
    mean = sample.kwargs.get("reduction", "mean") == "mean"
    return 1 / max(len(sample.args[0]), 1) if mean else 1.0


def most(sizes: Tensor, sample: Sample) -> float:
    if sample.kwargs.get("reduction") == "sum":
        return sizes.sum().item()
    return sizes.max().item() if len(sizes) else 0.0


def bad_temperatures(name: str) -> Iterator[tuple[str, Any, type[Exception], str]]:
    for value in (0.0, -0.1, float("nan"), float("inf")):
        yield str(value), value, ValueError, f"{name} must be a positive finite number, got {value}"
    yield "text", "0.1", TypeError, f"{name} must be a number, got str"
    yield "shape", torch.ones(2), ValueError, f"{name} must have shape [] or [1], got [2]"
    yield "integer", torch.tensor(1), TypeError, f"{name} must be float16, bfloat16, float32 or"


def bad_num_keys(keys: Tensor) -> Iterator[tuple[str, Any, type[Exception], str]]:  # [12, D]
    none = torch.tensor(0, device=keys.device)
    yield "zero", 0, ValueError, "num_keys must be from 1 to 12, got 0"
    yield "many", 13, ValueError, "num_keys must be from 1 to 12, got 13"
    yield "number", 3.0, TypeError, "num_keys must be an integer, got float"
    yield "float", none.float(), TypeError, "num_keys must be an integer tensor, got torch.float32"
    yield "shape", none[None], ValueError, "num_keys must have no dimension, got shape [1]"
    yield "device", none.to("meta"), ValueError, f"num_keys must be on {keys.device} like keys"
    if keys.device.type == "cpu":
        yield "empty", none, ValueError, "num_keys must be from 1 to 12, got 0"


def shape(
    name: str, B: int, D: int, K: int, workload: str, device: str | None = None
) -> BenchShape:
    return BenchShape(name, {"B": B, "D": D, "K": K}, workload, device=device)


def bench_rows(
    shape: BenchShape, sizes: str, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """A matrix for each letter, of as many rows."""
    D = shape.sizes["D"]
    return [
        randn(shape.sizes[size], D, seed=seed, device=device, dtype=dtype)
        for seed, size in enumerate(sizes)
    ]


def with_unit_keys(at: int) -> Callable[[Sample], Sample]:
    """A queue holds unit rows: they are made before the clock starts."""

    def prepare(sample: Sample) -> Sample:
        args = list(sample.args)
        args[at] = F.normalize(args[at], dim=-1)
        return Sample(sample.name, tuple(args), sample.kwargs)

    return prepare


def without_options(sample: Sample) -> None:
    """Refuse what an eager baseline does not write."""
    if sample.kwargs:
        raise ValueError(f"sample must have no option, got {sample.kwargs}")


def by_rows(definition: Callable[..., Tensor], keys_at: int) -> ByRows:
    """Of a mean over rows, each of which sees all keys and no other row."""

    def losses(sample: Sample, rows: Tensor) -> Tensor:
        args = [x if at == keys_at else x[rows] for at, x in enumerate(sample.args)]
        options = dict(sample.kwargs)
        if "exclude" in options:
            options["exclude"] = options["exclude"][rows]
        return definition(*args, **options, reduction="none")

    return ByRows(losses, divisor=len, independent=True)


def two_products(queries: Tensor, keys: Tensor, *_: Tensor) -> Tensor:
    """Similarities, and what stands in for their derivatives, back to the rows."""
    return (queries @ keys.mT) @ keys


def cost_of(shape: BenchShape, dtype: torch.dtype, sides: int) -> Cost:
    """Two products a side; one read of rows and keys, one write of the student's gradient."""
    B, D, K = (shape.sizes[name] for name in "BDK")
    size = ((1 + sides) * B * D + K * D) * dtype.itemsize
    return Cost(flops=4.0 * sides * B * D * K, bytes=float(size))


EAGER_TILES = 5  # B x K matrices that the definition with autograd holds at its peak


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    """B x K matrices alive at once, in the dtype that a variant computes in, and the gradients."""
    B, D, K = (shape.sizes[name] for name in "BDK")
    if variant == "mm":
        return (B * K + 2 * B * D) * dtype.itemsize
    as_users_write_it = variant in ("eager", "compile")
    acc = dtype.itemsize if as_users_write_it else max(dtype.itemsize, 4)
    tiles = EAGER_TILES * B * K if variant in ("eager", "compile", "reference") else 0
    copies = 3 * K * D if variant in ("eager", "compile", "reference") else 0
    return (tiles + copies + 8 * B * D) * acc
