# SPDX-License-Identifier: Apache-2.0
"""Timing of ops against named baselines: what `kdkernels bench` and the suite under benchmarks/
measure.

A time is the median over rounds in one process in which all variants take turns, so that what
disturbs one disturbs all. Variants are the backends, three baselines and the op's peers: "eager"
(the definition with autograd, or where `OpInfo.eager` says so what a user writes instead, whose
preparations are no part of the time), "compile" (torch.compile of it), "mm" (the products in
`OpInfo.product`, in every mode all of them; by default that of the first argument with its own
transpose, which the obvious way starts with) and other libraries by name, some of which do a part
of the work. Only the first argument asks for a gradient: a teacher is frozen.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.testing import clock, numerics, peers
from kdkernels.testing.clock import Call
from kdkernels.testing.opinfo import BenchShape, OpInfo, Sample

MODES = ("fwd_bwd", "fwd", "bwd")
BASELINES = ("eager", "compile", "mm")
# Of the first argument of the product that gives the rate of the machine where all do not fit.
PART_ROWS = 4096
SETS = 3  # of inputs in rotation; on a GPU as many as exceed three times its L2 cache
BLOCK_SECONDS = 2e-3  # a clock reading every few milliseconds, whatever a call takes
GIB = 1024.0**3
GATE_SAMPLES = ("aligned", "ragged_all", "wide")


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int


def measure(
    variants: dict[str, Call],
    *,
    seconds: float,
    device: torch.device,
    calls_of: dict[str, int] | None = None,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    warm_up_seconds: float = 0.2,
    on_round: Callable[[float], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Time the variants round-robin: every round runs a block of calls of each, in turn.

    Args:
        variants: Each called with the number of the call, from 0, which picks its input set.
        seconds: What all rounds may take together; at least `min_rounds` are made.
        device: Where they run; its clock is `clock.of(device)`.
        calls_of: How many calls one of a variant's stands for, as a replay of a graph does; 1 for
            a variant that is not there.
        min_rounds, max_rounds: How many rounds at least and at most.
        warm_up_seconds: For each variant, and one call at least.
        on_round: Told the finished share after each round.
        on_failure: Told of a variant that raised, which is left out from there on; by default its
            exception is raised.
    """
    read = clock.of(device).seconds
    blocks: dict[str, int] = {}
    taken: dict[str, list[float]] = {}
    per = {name: (calls_of or {}).get(name, 1) for name in variants}

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            if on_failure is None:
                raise
            taken.pop(name, None)
            on_failure(name, error)

    def warm_up(name: str) -> None:
        call = variants[name]
        call(0)
        spent, count, seen = 0.0, 0, 0.0
        while count == 0 or spent < warm_up_seconds:
            seen = read(call, count, 1)
            spent, count = spent + max(seen, 1e-7), count + 1
        blocks[name] = max(1, min(10_000, round(BLOCK_SECONDS / max(seen, 1e-7))))
        taken[name] = []

    def time_block(name: str) -> None:
        count = blocks[name]
        block_seconds = read(variants[name], rounds * count, count)
        taken[name].append(block_seconds / count / per[name] * 1e6)

    for name in variants:
        attempt(name, functools.partial(warm_up, name))
    begin, rounds = time.perf_counter(), 0
    while taken and (
        rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - begin < seconds)
    ):
        names = list(taken)
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            attempt(name, functools.partial(time_block, name))
        rounds += 1
        if on_round is not None:
            on_round(
                min(
                    1.0,
                    max(rounds / max_rounds, (time.perf_counter() - begin) / max(seconds, 1e-9)),
                )
            )
    return {name: _timing(times) for name, times in taken.items()}


def _timing(times: list[float]) -> Timing:
    p20, p50, p80 = (
        torch.tensor(times, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8]).double())
        .tolist()
    )
    return Timing(p20, p50, p80, len(times))


def variant_function(info: OpInfo, sample: Sample, variant: str) -> Callable[..., Tensor]:
    """The function that a variant names, of the tensors of `variant_sample`."""
    if variant == "eager":
        return definition(info, sample) if info.eager is None else info.eager.function(sample)
    if variant == "compile":
        return torch.compile(variant_function(info, sample, "eager"), dynamic=False)
    if variant in ("mm", "mm_part"):
        return info.product.function
    if variant in info.peers:
        return peers.get(info, variant).function(sample)
    return lambda *args: info.function(*args, **sample.kwargs, backend=variant)


def definition(info: OpInfo, sample: Sample) -> Callable[..., Tensor]:
    """The definition of an op, of the sample's tensors."""
    return lambda *args: info.define(sample, args)


def variant_sample(info: OpInfo, sample: Sample, variant: str) -> Sample:
    """What a variant is timed on: preparations are no part of its time."""
    if variant in info.peers:
        return peers.get(info, variant).prepare(sample)
    if variant in ("eager", "compile") and info.eager is not None:
        return info.eager.prepare(sample)
    if variant == "mm_part":
        x, *rest = sample.args
        return replace(sample, args=(x[..., :PART_ROWS, :], *rest))
    return sample


def timed(
    function: Callable[..., Tensor], sets: Sequence[tuple[Any, ...]], mode: str, variant: str
) -> Call:
    """One call of a mode: the forward, the backward of a stored graph, or both."""
    sets = [(args[0].detach().requires_grad_(), *args[1:]) for args in sets]

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return function(*sets[i % len(sets)])

    if mode == "fwd" or variant.startswith("mm"):
        return forward
    if mode == "bwd":
        values = [function(*args) for args in sets]
        douts = [torch.ones_like(value) for value in values]

        def backward(i: int) -> tuple[Tensor, ...]:
            i %= len(sets)
            return torch.autograd.grad(values[i], sets[i][0], douts[i], retain_graph=True)

        return backward

    def both(i: int) -> tuple[Tensor, ...]:
        args = sets[i % len(sets)]
        return torch.autograd.grad(function(*args).sum(), args[0])

    return both


def input_sets(sample: Sample, device: torch.device) -> list[tuple[Any, ...]]:
    """The sample and copies of it with their rows moved along: other memory, the same work."""
    count = SETS
    if device.type == "cuda":
        size = sum(
            arg.numel() * arg.element_size() for arg in sample.args if isinstance(arg, Tensor)
        )
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(64, max(SETS, math.ceil(3 * cache / max(size, 1))))

    def moved(arg: Any, i: int) -> Any:
        return arg.roll(i, 0) if i and isinstance(arg, Tensor) and arg.dim() else arg

    return [tuple(moved(arg, i) for arg in sample.args) for i in range(count)]


def memory_limit(device: torch.device) -> float:
    """Bytes that a variant may be estimated to need: half of what is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of ended work is free, too
        return 0.5 * torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 0.5 * int(line.split()[1]) * 1024
    return 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rejection(info: OpInfo, sample: Sample, backend: str) -> str | None:
    """Why a backend cannot run a sample; None if it can."""
    plan = _dispatch.plan(info.public, *sample.args, **sample.kwargs, backend=backend)
    return _dispatch.why_not(info.op, backend, plan.operator_args)


def why_skip(
    info: OpInfo,
    shape: BenchShape,
    sample: Sample,
    variant: str,
    dtype: torch.dtype,
    limit: float,
    mode: str = "fwd_bwd",
    device: torch.device | None = None,
) -> str | None:
    """Why a variant is not run on a shape in a mode; None if it is."""
    device = device or sample.args[0].device
    if variant in _dispatch.BACKENDS:
        reason = rejection(info, sample, variant)
        if reason is not None:
            return reason
    if variant not in (*_dispatch.BACKENDS, *BASELINES):
        reason = peers.why_not(info, variant, shape, dtype, mode, device)
        if reason is not None:
            return reason
    if variant == "compile" and device.type == "cpu" and not _has_compiler():
        return "torch.compile needs a C++ compiler"
    needed = info.memory(shape, dtype, variant) if info.memory is not None else 0.0
    if needed > limit:
        return f"needs about {needed / GIB:.0f} GiB, {limit / GIB:.0f} GiB allowed"
    return None


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def gate(info: OpInfo, backend: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What is wrong with a backend before it is timed: the samples that miss their budget or raise
    anything."""
    failed = []
    for sample in info.samples(device, dtype):
        if sample.name.partition("-")[0] not in GATE_SAMPLES:
            continue
        try:
            if rejection(info, sample, backend) is None:
                errors = numerics.check_sample(info, sample, dtype, backend)
                failed += [f"{sample.name}: {e.detail}" for e in errors if not e.ok]
        except Exception as error:  # of a compiler, of a kernel: a finding, and the next is asked
            failed.append(f"{sample.name}: {reason(error)}")
    return [f"{info.name} on {backend}, {text}" for text in failed]


def reason(error: Exception) -> str:
    """An exception in a record."""
    return f"{type(error).__name__}: {error}"


def synchronised(call: Call, device: torch.device) -> Call:
    """The same call, finished when it returns: for a clock that knows nothing of streams."""
    synchronise = clock.of(device).synchronise

    def wait(i: int) -> Any:
        result = call(i)
        synchronise()
        return result

    return wait
