# SPDX-License-Identifier: Apache-2.0
"""Fills Triton's cache in many processes, before one process of a GPU would compile in turn.

    python -m kdkernels.testing.warm [--table] [--op OP ...] [--dtype DTYPE ...]

A process that has a GPU compiles a kernel when it first launches it, about 0.4 seconds each, and
the samples of `kdkernels check` need more than a thousand. Here their calls, and with `--table`
those of `kdkernels bench --table`, are made on CPU tensors, configured for the present GPU. A hook
of Triton's before each compilation keeps what the JIT would compile and launches nothing; then all
processes compile that by `JITFunction.preload`. So the entries of the cache are those that the JIT
looks up. `--target` names a GPU that need not be here.

Compiled kernels stay in the cache when this is interrupted. Exit status 1 if something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import importlib
import itertools
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from kdkernels._dispatch import BackendUnavailableError, implementation
from kdkernels.testing import numerics
from kdkernels.testing.gpu_table import GPU_TABLE
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos

DTYPES = ("bfloat16", "float32", "float16")
CPU = torch.device("cpu")
_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
_REPORT_SECONDS = 5.0
_GRACE = 10.0  # seconds that the last compilations may take after the time is up


class Device(NamedTuple):
    """The GPU that is compiled for."""

    target: Any  # triton's GPUTarget
    arch: Any  # kdkernels.triton.common.launch.Arch


class Calls(NamedTuple):
    """Calls of one op: samples of `kdkernels check` in a dtype, or one shape of the table."""

    op: str
    dtype: str
    shape: str | None


class Kernel(NamedTuple):
    """One specialisation of a kernel, as `JITFunction.preload` takes it."""

    module: str
    name: str
    specialisation: str


@dataclass
class Outcome:
    """What became of a run."""

    compiled: int = 0
    left: int = 0  # pieces of work that the time was too short for
    failures: list[str] = field(default_factory=list)


def present() -> Device:
    """The current GPU. This initialises CUDA, so processes are forked before."""
    from triton.runtime.driver import driver

    from kdkernels.triton.common.launch import arch_of

    return Device(driver.active.get_current_target(), arch_of(torch.empty(0, device="cuda")))


def named(name: str) -> Device:
    """A GPU of the ahead-of-time tests."""
    from triton.backends.compiler import GPUTarget

    from kdkernels.testing.aot.recorder import TARGETS

    if name.startswith("gfx"):
        return Device(GPUTarget("hip", name, 64), TARGETS[name])
    return Device(GPUTarget("cuda", int(name.removeprefix("sm_")), 32), TARGETS[name])


def plan(ops: Sequence[str], dtypes: Sequence[str], table: bool = False) -> list[Calls]:
    """What is recorded, the table first."""
    infos = {info.name: info for info in opinfos() if info.name in ops}
    shapes = dict.fromkeys((op, shape) for op, shape, _ in GPU_TABLE if op in infos)
    calls = [Calls(op, "bfloat16", shape) for op, shape in shapes] if table else []
    return calls + [
        Calls(name, dtype, None)
        for name, info in infos.items()
        for dtype in dtypes
        if getattr(torch, dtype) in info.dtypes
    ]


def samples(calls: Calls) -> tuple[OpInfo, Iterable[Sample], int]:
    """The op, the calls, and how many of their first arguments ask for a gradient."""
    (info,) = (info for info in opinfos() if info.name == calls.op)
    dtype = getattr(torch, calls.dtype)
    if calls.shape is None:
        return info, info.samples(CPU, dtype), len(info.diff_args)
    (shape,) = (shape for shape in info.bench if shape.name == calls.shape)
    return info, [info.bench_sample(shape, CPU, dtype)], 1


@contextlib.contextmanager
def on_cpu_tensors(device: Device) -> Iterator[None]:
    """Triton's launchers take CPU tensors, configured for a GPU, by a driver that launches nothing.

    Memory that no kernel writes is zero: torch reads indices from it.
    """
    from triton.runtime.driver import driver

    from kdkernels.testing.no_launches import Driver, cpu_tensors_for

    def zeros(allocate: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()

    driver.set_active(Driver(device.target))
    with contextlib.ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, zeros(getattr(owner, name))))
        stack.enter_context(cpu_tensors_for(device.arch))
        yield


def call(info: OpInfo, sample: Sample, gradients: int) -> str | None:
    """Forward and backward of a sample on the Triton backend, if it takes it; why that failed."""
    try:
        numerics.value_and_grads(
            lambda *args: info.function(*args, **sample.kwargs, backend="triton"),
            sample.args,
            gradients,
        )
    except BackendUnavailableError:
        return None  # then nothing is compiled either
    except Exception as error:
        return _short(error)
    return None


def record(calls: Calls, device: Device) -> tuple[list[Kernel], list[str]]:
    """The kernels that calls would compile, and the calls that failed."""
    info, found, gradients = samples(calls)
    return record_samples(info, found, gradients, device)


def record_samples(
    info: OpInfo, calls: Iterable[Sample], gradients: int, device: Device
) -> tuple[list[Kernel], list[str]]:
    """The same of samples, whose first `gradients` arguments ask for one."""
    from triton import knobs

    found: dict[Kernel, None] = {}
    failures = []

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[Kernel(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # neither compiles nor launches

    with on_cpu_tensors(device), mock.patch.object(knobs.runtime, "jit_cache_hook", keep):
        for sample in calls:
            failure = call(info, sample, gradients)
            if failure is not None:
                failures.append(f"{info.name} {sample.name}: {failure}")
    return list(found), failures


def compile_kernel(kernel: Kernel, device: Device) -> list[str]:
    """Compile into the cache, or find it there; why that failed."""
    from triton.runtime.driver import driver

    from kdkernels.testing.no_launches import Driver

    driver.set_active(Driver(device.target))
    try:
        getattr(importlib.import_module(kernel.module), kernel.name).preload(kernel.specialisation)
    except Exception as error:
        return [f"{kernel.name}: {_short(error)}"]
    return []


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def warm(calls: Sequence[Calls], pool: Any, processes: int, device: Device, end: float) -> Outcome:
    """Record and compile in the processes of a pool until the time `end` of `time.monotonic`."""
    outcome = Outcome()
    order = itertools.count()  # among equals, first in, first out
    # what the table needs comes first, then recordings, which show what there is to compile
    waiting: list[tuple[int, int, Callable[..., Any], Any]] = [
        (0 if one.shape else 2, next(order), record, one) for one in calls
    ]
    heapq.heapify(waiting)
    done: queue.SimpleQueue[tuple[int, Callable[..., Any], Any]] = queue.SimpleQueue()
    known: set[Kernel] = set()
    running, reported = 0, time.monotonic()

    def begin() -> None:
        rank, _, function, what = heapq.heappop(waiting)

        def put(result: Any) -> None:
            done.put((rank, function, result))

        def fail(error: BaseException) -> None:
            empty = [f"{what}: {error}"[:300]]
            done.put((rank, function, ([], empty) if function is record else empty))

        pool.apply_async(function, (what, device), callback=put, error_callback=fail)

    while waiting or running:
        while waiting and running < processes and time.monotonic() < end:
            begin()
            running += 1
        if not running:
            break
        try:
            rank, function, result = done.get(timeout=max(end - time.monotonic(), 0.0) + _GRACE)
        except queue.Empty:
            outcome.failures.append(f"{running} processes had not answered {_GRACE:.0f} s later")
            break
        running -= 1
        if function is record:
            kernels, failures = result
            for kernel in kernels:
                if kernel not in known:
                    known.add(kernel)
                    heapq.heappush(waiting, (rank + 1, next(order), compile_kernel, kernel))
        else:
            failures = result
            outcome.compiled += not failures
        outcome.failures += failures
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            print(f"{outcome.compiled} of {len(known)} kernels so far", flush=True)
    outcome.left = len(waiting)
    return outcome


def start() -> None:
    """What a process of the pool begins with: one thread, and no GPU, which autograd would open."""
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main(argv: Sequence[str] | None = None) -> int:
    names = [info.name for info in opinfos()]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", nargs="+", choices=names, default=names, metavar="OP")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--table", action="store_true", help="shapes of the table too, and first")
    parser.add_argument("--target", metavar="NAME", help="e.g. sm_90 (default: the present GPU)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=600.0, help="start nothing after these")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET must not be set: the interpreter compiles nothing")
    begin = time.monotonic()
    calls = plan(args.op, args.dtype, args.table)
    for info in opinfos():  # imported once, before the fork
        implementation(info.op, "triton")
    with multiprocessing.get_context("fork").Pool(args.processes, start) as pool:
        device = named(args.target) if args.target else present()
        outcome = warm(calls, pool, args.processes, device, begin + args.seconds)
    print(*outcome.failures, sep="\n")
    print(
        f"{outcome.compiled} kernels for {device.arch.name} in {time.monotonic() - begin:.0f} s by "
        f"{args.processes} processes, {len(outcome.failures)} failures, {outcome.left} left"
    )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
