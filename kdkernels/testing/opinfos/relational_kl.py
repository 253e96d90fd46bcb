# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of relational_kl and info_nce."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops.info_nce import info_nce
from kdkernels.ops.relational_kl import relational_kl
from kdkernels.reference import relational_kl as reference
from kdkernels.testing.opinfo import BadInput, BenchShape, Cost, OpInfo, Sample, randn, rng

# (B, D, K); keys beyond one tile of a kernel, and numbers of them that fill none
SHAPES = {
    "tiny": (2, 3, 4),
    "aligned": (64, 32, 64),
    "ragged_rows": (67, 16, 32),
    "ragged_cols": (32, 37, 53),
    "ragged_all": (71, 13, 29),
    "one_row": (1, 7, 12),
    "one_key": (9, 5, 1),
    "wide": (7, 211, 173),
    "many_keys": (5, 3, 1031),
}


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / (max(len(rows), 1) if reduction == "mean" else 1)


def definition(*args: Any, reduction: str = "mean", **options: Any) -> Tensor:
    return _reduced(reference.relational_kl(*args, **options), reduction)


def definition_of_info_nce(*args: Any, reduction: str = "mean", **options: Any) -> Tensor:
    return _reduced(reference.info_nce(*args, **options), reduction)


def _draw(B: int, D: int, E: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A student, a teacher (that resembles it where E = D), and keys around them for both sides."""
    cpu, double = torch.device("cpu"), torch.float64
    student = randn(B, D, seed=1, device=cpu, dtype=double)
    teacher = randn(B, E, seed=2, device=cpu, dtype=double)
    if E == D:
        teacher = student + 0.7 * teacher
    keys, teacher_keys = (randn(K, n, seed=3 + n, device=cpu, dtype=double) for n in (D, E))
    return student, teacher, keys, teacher_keys


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def to(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.to(device, dtype) for x in tensors)

    def shared(B: int, D: int, K: int) -> tuple[Tensor, ...]:
        return to(*_draw(B, D, D, K)[:3])

    for name, shape in SHAPES.items():
        yield Sample(name, shared(*shape))
    plain = {"normalize": False, "student_temperature": 1.3, "teacher_temperature": 0.8}
    yield Sample("one_col", shared(19, 1, 9), plain)
    yield Sample("two_banks", to(*_draw(17, 7, 7, 26)), {**plain, "reduction": "none"})
    exclude = torch.arange(5, device=device)
    options = {"divergence": "cross_entropy", "exclude": exclude}
    yield Sample("two_widths", to(*_draw(5, 4, 6, 9)), options)
    s, t, q = shared(13, 6, 19)
    yield Sample("own_keys", (s, t, q), {"own_keys": t.flip(1), "reduction": "none"})
    sharp = {"student_temperature": 0.001, "teacher_temperature": 0.001}
    yield Sample("sharp", shared(11, 8, 43), sharp)
    options = {"num_keys": torch.tensor(11, device=device), "reduction": "sum"}
    exclude = torch.arange(-1, 12, dtype=torch.int32, device=device)
    yield Sample("num_keys", (s, t, q), {**options, "exclude": exclude})
    s, t, q = shared(46, 12, 35)
    yield Sample("strided", (s.T.contiguous().T[::2], t[::2], q.T.contiguous().T))
    yield Sample("empty", shared(0, 4, 6))
    yield Sample("no_features", shared(5, 0, 11))


def samples_of_info_nce(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(B: int, D: int, K: int) -> tuple[Tensor, ...]:
        queries, _, keys, _ = _draw(B, D, D, K)
        positives = torch.randint(K, (B,), generator=rng(5))
        return queries.to(device, dtype), keys.to(device, dtype), positives.to(device)

    for name, shape in SHAPES.items():
        yield Sample(name, draw(*shape))
    yield Sample("one_col", draw(19, 1, 9), {"normalize": False, "temperature": 1.3})
    x, q, y = draw(13, 6, 19)
    yield Sample("none", (x, q, y), {"reduction": "none"})
    options = {"num_keys": torch.tensor(11, device=device), "reduction": "sum"}
    yield Sample("num_keys", (x, q, y.int() % 11), options)
    yield Sample("sharp", draw(11, 8, 43), {"temperature": 0.001})
    x, q, y = draw(46, 12, 35)
    yield Sample("strided", (x.T.contiguous().T[::2], q.T.contiguous().T, y[::2]))
    yield Sample("empty", draw(0, 4, 6))


def _side(
    rows: Tensor, keys: Tensor, temperature: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In fp64: probabilities [B, K], sizes of the logits [B], and of d(logit) / d(row) [B] and
    d(logit) / d(key) [B, K] without their directions."""
    normalize, own = options.get("normalize", True), options.get("own_keys")
    K, keys = len(keys), reference.first(keys, options.get("num_keys"))
    rows, keys = rows.double(), keys.double()
    logits = reference.similarities(rows, keys, normalize)
    if own is not None:
        logits = torch.cat([logits, reference.own_similarities(rows, own, normalize)], 1)
    logits = logits / temperature
    sizes = logits.abs().amax(-1).clamp_min(1)
    if "exclude" in options:
        k = torch.arange(logits.shape[1], device=keys.device)
        logits = logits.masked_fill(k == options["exclude"][:, None], -torch.inf)
    p = logits.softmax(-1)[:, : len(keys)]
    of_rows, of_keys = (x.norm(dim=-1) for x in (rows, keys))
    if normalize:
        by_row = 1 / of_rows.clamp_min(reference.EPS)
        by_key = (1 / of_keys.clamp_min(reference.EPS)).expand_as(p)
    else:
        by_row, by_key = of_keys.max().expand(len(rows)), of_rows[:, None].expand_as(p)
    p, by_key = (F.pad(x, (0, K - len(keys))) for x in (p, by_key / temperature))
    return p, sizes, by_row / temperature, by_key


def magnitude(sample: Sample) -> tuple[float, tuple[Tensor, ...]]:
    """Logits are rounded relative to their size, and with them the loss. A softmax weight is wrong
    by as much relative to itself, and the derivative p (c - mean of c) by the teacher's logits by
    the rounding of c, which is of the size of both sides' logits."""
    student, teacher, keys, *others = sample.args
    by_student, by_teacher = (
        sample.kwargs.get(f"{side}_temperature", default)
        for side, default in (("student", 0.1), ("teacher", 0.02))
    )
    q, size_s, row_s, key_s = _side(student, keys, by_student, sample.kwargs)
    p, size_t, row_t, key_t = _side(teacher, (keys, *others)[-1], by_teacher, sample.kwargs)
    both = size_s + size_t
    share = _share(sample)
    dkeys = share * ((size_s[:, None] * q + size_t[:, None] * p) * key_s).sum(0)
    dteacher_keys = share * (both[:, None] * p * key_t).sum(0)
    banks = (dkeys, dteacher_keys) if others else (dkeys + dteacher_keys,)
    return _most(both, sample), (share * both * row_s, share * both * row_t, *banks)


def magnitude_of_info_nce(sample: Sample) -> tuple[float, tuple[Tensor, ...]]:
    queries, keys, _ = sample.args
    temperature = sample.kwargs.get("temperature", 0.07)
    q, size, row, key = _side(queries, keys, temperature, sample.kwargs)
    share = _share(sample)
    return _most(size, sample), (share * size * row, share * (size[:, None] * q * key).sum(0))


def _share(sample: Sample) -> float:
    """Of one row in the loss."""
    mean = sample.kwargs.get("reduction", "mean") == "mean"
    return 1 / max(len(sample.args[0]), 1) if mean else 1.0


def _most(sizes: Tensor, sample: Sample) -> float:
    if sample.kwargs.get("reduction") == "sum":
        return sizes.sum().item()
    return sizes.max().item() if len(sizes) else 0.0


def _bad_numbers(name: str) -> Iterator[tuple[str, Any, type[Exception], str]]:
    for value in (0.0, -0.1, float("nan"), float("inf")):
        yield str(value), value, ValueError, f"{name} must be a positive finite number, got {value}"
    yield "text", "0.1", TypeError, f"{name} must be a number, got str"
    yield "shape", torch.ones(1), ValueError, f"{name} must have no dimension, got shape [1]"
    yield "integer", torch.tensor(1), TypeError, f"{name} must be float16, bfloat16, float32 or"


def _bad_num_keys(keys: Tensor) -> Iterator[tuple[str, Any, type[Exception], str]]:  # [12, D]
    none = torch.tensor(0, device=keys.device)
    yield "zero", 0, ValueError, "num_keys must be from 1 to 12, got 0"
    yield "many", 13, ValueError, "num_keys must be from 1 to 12, got 13"
    yield "number", 3.0, TypeError, "num_keys must be an integer, got float"
    yield "float", none.float(), TypeError, "num_keys must be an integer tensor, got torch.float32"
    yield "shape", none[None], ValueError, "num_keys must have no dimension, got shape [1]"
    yield "device", none.to("meta"), ValueError, f"num_keys must be on {keys.device} like keys"
    if keys.device.type == "cpu":
        yield "empty", none, ValueError, "num_keys must be from 1 to 12, got 0"


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x, t = torch.ones(8, 4, device=device), torch.ones(8, 5, device=device)
    q, r = torch.ones(12, 4, device=device), torch.ones(12, 5, device=device)
    i = torch.arange(8, device=device)

    def bad(name: str, args: Any, error: type[Exception], message: str, **kw: Any) -> BadInput:
        return BadInput(name, args, kw, error, message)

    yield bad("one_dim", (x[0], x, q), ValueError, "student must have at least 2 dimensions")
    yield bad("three_dims", (x, x, q[None]), ValueError, "keys must have 2 dimensions")
    yield bad("list", (x, x, [[0.0]]), TypeError, "keys must be a torch.Tensor, got list")
    yield bad("integer", (x, x.long(), q), TypeError, "teacher must be float16, bfloat16, float32")
    yield bad("width", (x, x, r), ValueError, "keys must have 4 columns like student, got 5")
    yield bad(
        "teacher_width",
        (x, t, q),
        ValueError,
        "teacher must have 4 columns like keys, or teacher_keys of its own, got 5",
    )
    yield bad(
        "teacher_keys_width",
        (x, t, q, q),
        ValueError,
        "teacher_keys must have 5 columns like teacher, got 4",
    )
    yield bad("rows", (x, x[:7], q), ValueError, "teacher must have 8 rows like student, got 7")
    yield bad(
        "teacher_keys_rows",
        (x, t, q, r[:11]),
        ValueError,
        "teacher_keys must have 12 rows like keys, got 11",
    )
    yield bad("no_keys", (x, x, q[:0]), ValueError, "keys must have at least 1 row, got shape")
    for name, args in {
        "teacher": (x, x.double(), q),
        "keys": (x, x, q.double()),
        "teacher_keys": (x, t, q, r.double()),
    }.items():
        message = f"{name} must be torch.float32 like student, got torch.float64"
        yield bad(f"{name}_dtype", args, TypeError, message)
    yield bad(
        "device", (x, x, q.to("meta")), ValueError, f"keys must be on {x.device} like student"
    )
    for side in ("student_temperature", "teacher_temperature"):
        for name, value, error, message in _bad_numbers(side):
            yield bad(f"{side}_{name}", (x, x, q), error, message, **{side: value})
    yield bad("normalize", (x, x, q), TypeError, "normalize must be True or False", normalize=1)
    yield bad(
        "divergence", (x, x, q), ValueError, "divergence must be one of 'kl'", divergence="js"
    )
    yield bad(
        "own_keys_width", (x, x, q), ValueError, "own_keys must have 4 columns like", own_keys=t
    )
    yield bad(
        "own_keys_rows", (x, x, q), ValueError, "own_keys must have 8 rows like", own_keys=x[:7]
    )
    yield bad(
        "own_keys_dtype",
        (x, x, q),
        TypeError,
        "own_keys must be torch.float32 like student, got torch.float64",
        own_keys=x.double(),
    )
    message = "own_keys must be None where there are teacher_keys, got both"
    yield bad("own_keys_and_two_banks", (x, t, q, r), ValueError, message, own_keys=t)
    for name, value, error, message in _bad_num_keys(q):
        yield bad(f"num_keys_{name}", (x, x, q), error, message, num_keys=value)
    wrong = {
        "float": (i.float(), TypeError, "exclude must be an integer tensor"),
        "shape": (i[:7], ValueError, "exclude must have shape [8] like the rows of student"),
        "list": ([0] * 8, TypeError, "exclude must be a torch.Tensor"),
    }
    if device.type == "cpu":
        wrong["high"] = (i + 5, ValueError, "exclude must be from -1 to 11, got 12")
        wrong["low"] = (i - 2, ValueError, "exclude must be from -1 to 11, got -2")
    for name, (value, error, message) in wrong.items():
        yield bad(f"exclude_{name}", (x, x, q), error, message, exclude=value)
    yield bad("reduction", (x, x, q), ValueError, "reduction must be one of", reduction="max")
    yield bad("backend", (x, x, q), ValueError, "backend must be one of", backend="gpu")


def bad_inputs_of_info_nce(device: torch.device) -> Iterator[BadInput]:
    x, q = torch.ones(8, 4, device=device), torch.ones(12, 4, device=device)
    i = torch.arange(8, device=device)

    def bad(name: str, args: Any, error: type[Exception], message: str, **kw: Any) -> BadInput:
        return BadInput(name, args, kw, error, message)

    yield bad("one_dim", (x[0], q, i), ValueError, "queries must have at least 2 dimensions")
    yield bad("width", (x, q[:, :3], i), ValueError, "keys must have 4 columns like queries, got 3")
    yield bad("no_keys", (x, q[:0], i), ValueError, "keys must have at least 1 row")
    yield bad("dtype", (x, q.double(), i), TypeError, "keys must be torch.float32 like queries")
    yield bad("positives_dtype", (x, q, x[:, 0]), TypeError, "positives must be an integer tensor")
    yield bad("positives_shape", (x, q, i[:7]), ValueError, "positives must have shape [8] like")
    if device.type == "cpu":
        yield bad("high", (x, q, i + 5), ValueError, "positives must be from 0 to 11, got 12")
        yield bad("low", (x, q, i - 1), ValueError, "positives must be from 0 to 11, got -1")
        few = {"num_keys": torch.tensor(7)}
        yield bad("beyond", (x, q, i), ValueError, "positives must be from 0 to 6, got 7", **few)
    for name, value, error, message in _bad_num_keys(q):
        yield bad(f"num_keys_{name}", (x, q, i), error, message, num_keys=value)
    for name, value, error, message in _bad_numbers("temperature"):
        yield bad(f"temperature_{name}", (x, q, i), error, message, temperature=value)
    yield bad("normalize", (x, q, i), TypeError, "normalize must be True or False", normalize=1)
    yield bad("reduction", (x, q, i), ValueError, "reduction must be one of", reduction="max")
    yield bad("backend", (x, q, i), ValueError, "backend must be one of", backend="gpu")


def _shape(name: str, B: int, D: int, K: int, workload: str, **options: Any) -> BenchShape:
    return BenchShape(name, {"B": B, "D": D, "K": K}, workload, options)


BENCH = (
    _shape("rrd", 64, 128, 16384, "RRD on CIFAR-100: projections and queue of the public code"),
    _shape("rrd_large", 1024, 128, 16384, "the same at large batch"),
    _shape("compress", 256, 128, 131072, "a queue of the length of CompRess"),
    _shape("batch", 1024, 128, 1024, "the batch as its own bank: small enough for eager mode"),
)
BENCH_OF_INFO_NCE = (
    _shape("in_batch", 1024, 128, 1024, "in-batch negatives: small enough for eager mode"),
    _shape("moco", 256, 128, 65536, "the queue of MoCo and of DisCo"),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    B, D, K = (shape.sizes[name] for name in "BDK")
    rows = (randn(n, D, seed=n, device=device, dtype=dtype) for n in (B, B + 1, K))
    student, teacher, keys = rows
    return Sample(shape.name, (student, teacher[:B], keys), dict(shape.kwargs))


def bench_sample_of_info_nce(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    student, _, keys = bench_sample(shape, device, dtype).args
    positives = torch.arange(len(student), device=device)
    return Sample(shape.name, (student, keys, positives), dict(shape.kwargs))


def _cost(shape: BenchShape, dtype: torch.dtype, sides: int) -> Cost:
    """Two products a side; one read of rows and keys, one write of the student's gradient."""
    B, D, K = (shape.sizes[name] for name in "BDK")
    size = ((1 + sides) * B * D + K * D) * dtype.itemsize
    return Cost(flops=4.0 * sides * B * D * K, bytes=float(size))


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    return _cost(shape, dtype, sides=2)


def cost_of_info_nce(shape: BenchShape, dtype: torch.dtype) -> Cost:
    return _cost(shape, dtype, sides=1)


EAGER_TILES = 6  # B x K matrices that the definition with autograd holds at its peak


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    """B x K matrices alive at once, in the dtype that a variant computes in, and the gradients."""
    B, D, K = (shape.sizes[name] for name in "BDK")
    if variant == "mm":
        return B * B * dtype.itemsize
    acc = 8 if dtype == torch.float64 else 4
    tiles = EAGER_TILES * B * K if variant in ("eager", "compile", "reference") else 0
    copies = 3 * K * D if variant in ("eager", "compile", "reference") else 0
    return (tiles + copies + 8 * B * D) * acc


OPINFOS = [
    OpInfo(
        name="relational_kl",
        op="relational_kl",
        function=relational_kl,
        definition=definition,
        diff_args=("student", "teacher", "keys", "teacher_keys"),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        magnitude=magnitude,
        subtracts=True,
        memory=memory,
    ),
    OpInfo(
        name="info_nce",
        op="relational_kl",
        function=info_nce,
        definition=definition_of_info_nce,
        diff_args=("student", "keys"),
        samples=samples_of_info_nce,
        bad_inputs=bad_inputs_of_info_nce,
        bench=BENCH_OF_INFO_NCE,
        bench_sample=bench_sample_of_info_nce,
        cost=cost_of_info_nce,
        magnitude=magnitude_of_info_nce,
        subtracts=True,
        memory=memory,
    ),
]
