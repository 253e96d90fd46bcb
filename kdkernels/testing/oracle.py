# SPDX-License-Identifier: Apache-2.0
"""The fp64 value and gradient that a benchmark's errors are measured against.

In this order, as far as memory allows on the device that runs: the definition with autograd; on a
GPU the definition a few rows at a time, where `OpInfo.by_rows` says how; the reference backend; on
a CPU its own backend, whose fp64 kernels the tests hold to the definition. Where none can, errors
are not measured and the record says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdkernels.testing import bench, clock, numerics
from kdkernels.testing.bench import GIB
from kdkernels.testing.opinfo import BenchShape, ByRows, OpInfo, Sample

DEFINITION_BYTES = 2 * GIB  # most that the definition may need; beyond, it takes long
ROWS_BYTES = 4 * GIB  # of the rows that are held at once, and at most a quarter of what is free
ROW_MATRICES = 12  # of rows x columns, that a definition of some rows holds with autograd
ROWS_SECONDS = 30.0  # fp64 is slow on GPUs of the desktop


@dataclass(frozen=True)
class Oracle:
    """What is true, as far as it is known."""

    name: str  # what was computed, or why nothing was
    value: Tensor | None = None
    gradient: Tensor | None = None  # of the first argument
    rows: Tensor | None = None  # the only ones that the gradient was computed for


def oracle(info: OpInfo, shape: BenchShape, sample: Sample, device: torch.device) -> Oracle:
    """The first that memory allows and that raises nothing."""
    free = bench.memory_limit(device)
    args = numerics.cast(sample.args, torch.float64)
    failed = []
    for name, needed, limit, compute in _ways(info, shape, sample, args, device, free):
        if needed > limit:
            failed.append(f"{name} needs about {needed / GIB:.0f} GiB of {limit / GIB:.0f}")
            continue
        try:
            return compute()
        except Exception as error:
            failed.append(f"{name}: {bench.reason(error)}")
        clock.of(device).forget_failure()
    return Oracle(f"not checked: {'; '.join(failed)}")


_Way = tuple[str, float, float, Callable[[], Oracle]]  # name, bytes needed, bytes allowed


def _ways(
    info: OpInfo,
    shape: BenchShape,
    sample: Sample,
    args: tuple[Any, ...],
    device: torch.device,
    free: float,
) -> list[_Way]:
    def needs(variant: str) -> float:
        return 0.0 if info.memory is None else info.memory(shape, torch.float64, variant)

    def whole(name: str, variant: str, limit: float, function: Callable[..., Tensor]) -> _Way:
        def compute() -> Oracle:
            return Oracle(name, *_value_and_gradient(function, args))

        return name, needs(variant), limit, compute

    def rows() -> Oracle:
        synchronise = clock.of(device).synchronise
        return by_rows(info.by_rows, replace(sample, args=args), budget, synchronise)

    budget = min(ROWS_BYTES, free / 4)
    definition = bench.definition(info, sample)
    ways = [whole("definition in fp64", "eager", DEFINITION_BYTES, definition)]
    if device.type != "cpu" and info.by_rows is not None:
        ways.append(("definition in fp64 by rows", 0.0, budget, rows))
    backends = ("reference", "cpu") if device.type == "cpu" else ("reference",)
    for backend in backends:
        function = bench.variant_function(info, sample, backend)
        ways.append(whole(f"{backend} backend in fp64", backend, free, function))
    return ways


def by_rows(
    how: ByRows,
    sample: Sample,  # in fp64
    budget: float,  # bytes
    synchronise: Callable[[], None],
    seconds: float = ROWS_SECONDS,
) -> Oracle:
    """The definition, as many rows at a time as fit a budget. What takes longer than `seconds` ends
    with the gradient of the rows that were done, if others do not add to it.

    Raises:
        TimeoutError: it takes longer, and rows depend on each other.
    """
    first = sample.args[0]
    B = len(first)
    columns = max(len(arg) for arg in sample.args if isinstance(arg, Tensor) and arg.dim())
    held = max(1, int(budget / (8.0 * ROW_MATRICES * columns)))
    parts = -(-B // held)
    losses, gradient = first.new_zeros(B), torch.zeros_like(first)
    begin = time.perf_counter()
    for part in range(parts):
        rows = torch.arange(part, B, parts, device=first.device)  # spread, as a sample must be
        leaf = first.detach().requires_grad_()
        of_rows = how.losses(replace(sample, args=(leaf, *sample.args[1:])), rows)
        gradient += torch.autograd.grad(of_rows.sum(), leaf)[0]
        losses[rows] = of_rows.detach()
        synchronise()
        if part + 1 < parts and time.perf_counter() - begin > seconds:
            return _part_of(how, B, losses, gradient, part + 1, parts)
    divisor = how.divisor(losses)
    return Oracle(
        "definition in fp64, all rows in parts", losses.sum() / divisor, gradient / divisor
    )


def _part_of(
    how: ByRows, B: int, losses: Tensor, gradient: Tensor, done: int, parts: int
) -> Oracle:
    if not how.independent:
        raise TimeoutError(f"{done} of {parts} parts of the rows took all the time there is")
    number = torch.arange(B, device=gradient.device)
    rows = number[number % parts < done]
    gradient = gradient / how.divisor(losses)
    return Oracle(f"definition in fp64, {len(rows)} rows of the gradient", None, gradient, rows)


def _value_and_gradient(
    function: Callable[..., Tensor], args: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    first = args[0].detach().requires_grad_()
    value = function(first, *args[1:])
    return value.detach(), torch.autograd.grad(value.sum(), first)[0]


def relative_errors(
    function: Callable[..., Tensor], sample: Sample, truth: Oracle, name: str
) -> dict[str, float]:
    """Largest error of the value and of the first gradient, each over the largest true
    magnitude, as far as the oracle knows them. The sample is the function's own, of
    `variant_sample`."""
    if truth.gradient is None:
        return {}
    value, gradient = _value_and_gradient(function, sample.args)
    errors = {}
    if truth.value is not None:
        errors["loss"] = _relative_error(value, truth.value)
    known = gradient if truth.rows is None else gradient[truth.rows]
    true = truth.gradient if truth.rows is None else truth.gradient[truth.rows]
    errors[f"d{name}"] = _relative_error(known, true)
    return errors


def _relative_error(out: Tensor, hi: Tensor) -> float:
    return ((out.double() - hi).abs().max() / hi.abs().max().clamp_min(1e-300)).item()
