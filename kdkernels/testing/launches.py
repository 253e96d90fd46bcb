# SPDX-License-Identifier: Apache-2.0
"""What one training step of each op costs the host on a GPU: kernels, bytes and time, without one.

    python -m kdkernels.testing.launches [--time] > launches.json

runs in a process of its own, without TRITON_INTERPRET. Launches of Triton kernels are caught before
they reach a driver, so nothing is computed and results hold whatever was in memory. A kernel is a
Triton launch, or a torch operation that is no view and no allocation; a torch operation that starts
several kernels of its own counts as one. Each step is a forward and a backward for the first
argument, in bf16, small enough that a GPU waits for its host.

With `--time`, kernels are compiled for sm_90 and launched through Triton's own path by a driver
that launches nothing: the time is what Python takes on this machine's CPU, in one thread: the
median and the least of many steps. A GPU adds what its driver takes for a launch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkernels import _dispatch
from kdkernels.testing.steps import Step, steps

# Operations that start no kernel, though their results are new; a view's are not.
_ALLOCATIONS = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")
)
_RUNS = 200


@dataclass
class Counts:
    """What one step did."""

    kernels: Counter[str] = field(default_factory=Counter)  # Triton's, by name
    operations: Counter[str] = field(default_factory=Counter)  # torch's that start kernels
    bytes: int = 0  # of all memory that was asked for on the way, in the end as well

    @property
    def total(self) -> int:
        return self.kernels.total() + self.operations.total()

    def as_json(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "kernels": dict(self.kernels),
            "operations": dict(self.operations),
            "bytes": self.bytes,
        }


class Operations(TorchDispatchMode):
    """Takes torch's operations, also those inside the package's operators, to `run`."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, name = function._schema.name.split("::")
        if namespace != "kdkernels":
            return self.run(name, function, args, kwargs or {})
        *inputs, backend = args
        launchers = _dispatch.select(name.rpartition("_")[0], backend, tuple(inputs))
        with self:  # torch has turned it off for the time of this function
            return getattr(launchers, name)(*inputs)

    def run(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The results of an operation."""
        raise NotImplementedError


class _Counted(Operations):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def run(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        results = function(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        found = (x for x in tree_leaves(results) if isinstance(x, Tensor))
        stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
        new = [size for place, size in stored.items() if place not in given]
        self.counts.bytes += sum(new)
        if name not in _ALLOCATIONS and (new or function._schema.is_mutable):
            self.counts.operations[name] += 1
        return results


def _for_a_gpu() -> contextlib.AbstractContextManager[None]:
    """Tensors on the CPU are taken by Triton's launchers, configured for an H200."""
    from kdkernels.testing.aot.recorder import TARGETS
    from kdkernels.testing.no_launches import cpu_tensors_for

    return cpu_tensors_for(TARGETS["sm_90"])


def run(step: Step, function: Callable[..., Tensor]) -> None:
    """One forward and backward."""
    value = function(*step.args)
    value = value.sum() if value.dim() else value
    torch.autograd.grad(value, step.args[0])


def count(step: Step, backend: str) -> Counts:
    """What a step does on "triton", or as "eager" torch."""
    import triton

    from kdkernels.triton.common.prepared import every_launch_through_triton

    counts = Counts()

    def launched(kernel: Any, *, grid: Any, warmup: bool, **given: Any) -> None:
        counts.kernels[kernel.__name__] += 1

    function = step.eager if backend == "eager" else step.call
    kind = type(triton.jit(run))
    watched = mock.patch.object(kind, "run", launched)
    with _for_a_gpu(), every_launch_through_triton(), watched:
        run(step, function)  # what is computed once and kept is no part of a step
        counts.kernels.clear()
        with _Counted(counts):
            run(step, function)
    return counts


def host_microseconds(step: Step, backend: str) -> tuple[float, float]:
    """Time of a step of this thread, once everything is compiled: the median of many, and the
    least, which other work on the machine disturbs least."""
    from triton.runtime.driver import driver

    from kdkernels.testing.no_launches import Driver

    driver.set_active(Driver())
    function = step.eager if backend == "eager" else step.call
    with _for_a_gpu():
        for _ in range(10):
            run(step, function)
        taken = []
        for _ in range(_RUNS):
            begin = time.thread_time()
            run(step, function)
            taken.append(time.thread_time() - begin)
    return statistics.median(taken) * 1e6, min(taken) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--time", action="store_true", help="time the host, too")
    parser.add_argument("--step", nargs="*", help="only steps whose name contains one of these")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET must not be set: the interpreter launches nothing to count")
    torch.set_num_threads(1)
    found = []
    for step in steps():
        if arguments.step and not any(part in step.name for part in arguments.step):
            continue
        counts, eager = count(step, "triton"), count(step, "eager")
        entry: dict[str, Any] = {"step": step.name, "op": step.op}
        entry |= {"triton": counts.as_json(), "eager": eager.as_json()}
        if arguments.time:
            middle, least = host_microseconds(step, "triton")
            entry["triton"] |= {"host_us": round(middle, 1), "host_least_us": round(least, 1)}
        found.append(entry)
    json.dump(found, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
