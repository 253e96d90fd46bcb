# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of relational_kl."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.relational_kl import relational_kl
from kdkernels.testing.opinfo import BadInput, BenchShape, Cost, Eager, OpInfo, Product, Sample
from kdkernels.testing.opinfos import _key_bank as bank


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def to(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.to(device, dtype) for x in tensors)

    def shared(B: int, D: int, K: int) -> tuple[Tensor, ...]:
        return to(*bank.draw(B, D, D, K)[:3])

    for name, shape in bank.SHAPES.items():
        yield Sample(name, shared(*shape))
    options = {"normalize": False, "student_temperature": 1.3, "teacher_temperature": 0.8}
    yield Sample("one_col", shared(19, 1, 9), {**options, "reduction": "none"})
    s, t, q = shared(13, 6, 19)
    yield Sample("own_keys", (s, t, q), {"own_keys": t.flip(1), "reduction": "none"})
    exclude = torch.arange(5, device=device)
    options = {"divergence": "cross_entropy", "exclude": exclude}
    yield Sample("two_widths", to(*bank.draw(5, 4, 6, 9)), options)
    options = {"num_keys": torch.tensor(11, device=device), "reduction": "sum"}
    exclude = torch.arange(-1, 12, dtype=torch.int32, device=device)
    yield Sample("num_keys", (s, t, q), {**options, "exclude": exclude})
    sharp = {"student_temperature": 0.001, "teacher_temperature": 0.001}
    yield Sample("sharp", shared(41, 32, 64), sharp)
    s, t, q = shared(46, 12, 35)
    yield Sample("strided", (s.T.contiguous().T[::2], t[::2], q.T.contiguous().T))
    yield Sample("empty", shared(0, 4, 6))
    yield Sample("no_features", shared(5, 0, 11))


def magnitude(sample: Sample) -> tuple[float, tuple[Tensor, ...]]:
    """Logits are rounded relative to their size, and with them the loss. A softmax weight is wrong
    by as much relative to itself, and the derivative p (c - mean of c) by the teacher's logits by
    the rounding of c, which is of the size of both sides' logits."""
    student, teacher, keys, *others = sample.args
    by_student, by_teacher = (
        sample.kwargs.get(f"{side}_temperature", default)
        for side, default in (("student", 0.1), ("teacher", 0.02))
    )
    q, size_s, row_s, key_s = bank.side(student, keys, by_student, sample.kwargs)
    p, size_t, row_t, key_t = bank.side(teacher, (keys, *others)[-1], by_teacher, sample.kwargs)
    both = size_s + size_t
    share = bank.share(sample)
    dkeys = share * ((size_s[:, None] * q + size_t[:, None] * p) * key_s).sum(0)
    dteacher_keys = share * (both[:, None] * p * key_t).sum(0)
    banks = (dkeys, dteacher_keys) if others else (dkeys + dteacher_keys,)
    return bank.most(both, sample), (share * both * row_s, share * both * row_t, *banks)


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
    yield bad(
        "device", (x, x, q.to("meta")), ValueError, f"keys must be on {x.device} like student"
    )
    for side in ("student_temperature", "teacher_temperature"):
        for name, value, error, message in bank.bad_temperatures(side):
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
    message = "own_keys must be None where there are teacher_keys, got both"
    yield bad("own_keys_and_two_banks", (x, t, q, r), ValueError, message, own_keys=t)
    for name, value, error, message in bank.bad_num_keys(q):
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


BENCH = (
    bank.shape("rrd", 64, 128, 16384, "RRD on CIFAR-100: projections and queue of the public code"),
    bank.shape("rrd_large", 1024, 128, 16384, "the same at large batch"),
    bank.shape("compress", 256, 128, 131072, "a queue of the length of CompRess"),
    bank.shape("batch", 1024, 128, 1024, "the batch as its own bank: small enough for eager mode"),
    bank.shape("seed_large", 4096, 128, 65536, "the queue of SEED at large batch", "cuda"),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    return Sample(shape.name, tuple(bank.bench_rows(shape, "BBK", device, dtype)))


def _eager(sample: Sample) -> Callable[..., Tensor]:
    """As users write it, with unit keys."""
    bank.without_options(sample)

    def of(student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
        s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
        log_q, log_p = (s @ keys.mT / 0.1).log_softmax(-1), (t @ keys.mT / 0.02).log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return of


def _four_products(student: Tensor, teacher: Tensor, keys: Tensor) -> Tensor:
    of_teacher = bank.two_products(teacher[: len(student)], keys)
    return of_teacher.addmm_(student @ keys.mT, keys)


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    return bank.cost_of(shape, dtype, sides=2)


OPINFOS = [
    OpInfo(
        name="relational_kl",
        op="relational_kl",
        function=relational_kl,
        definition=definitions.relational_kl,
        diff_args=("student", "teacher", "keys", "teacher_keys"),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        eager=Eager(_eager, bank.with_unit_keys(2)),
        product=Product(_four_products, lambda s, t, keys: 8.0 * s.numel() * len(keys)),
        magnitude=magnitude,
        subtracts=True,
        memory=bank.memory,
        by_rows=bank.by_rows(definitions.relational_kl, keys_at=2),
    ),
]
