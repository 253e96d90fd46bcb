# SPDX-License-Identifier: Apache-2.0
"""Clocks of a device: what reads the time of calls, replays them as one CUDA graph, and asks the
profiler for their kernels.

Ways of timing, `TIMINGS`: "graph" replays a captured graph of calls, so the host takes no part;
"call" makes the calls back to back from Python, as a user does; "kernels" is the profiler's time
of each kernel, added up. A CPU has "call" only.

The profiler goes last: calls were seen to be slower for the rest of a process that has used it
(pytorch/pytorch issue 144455).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TIMINGS = ("graph", "call", "kernels")
WARM_UP_CALLS = 3  # before a capture: libraries make their workspaces, kernels are compiled

Call = Callable[[int], Any]  # runs once on the input set of that number


@dataclass(frozen=True)
class Graph:
    """Calls that were captured."""

    call: Call  # replays them all, whatever its number is
    calls: int  # made by a replay
    launches: float | None  # nodes of the graph per call
    launches_unknown: str | None  # why, where they are
    release: Callable[[], None]  # its memory


@dataclass(frozen=True)
class Kernel:
    """A kernel, copy or fill on the device, per call."""

    name: str
    launches: float
    time_us: float


class HostClock:
    """Of the CPU."""

    timings: tuple[str, ...] = ("call",)

    def seconds(self, call: Call, first: int, count: int) -> float:
        """How long calls `first` to `first + count - 1` take together."""
        begin = time.perf_counter()
        for i in range(first, first + count):
            call(i)
        return time.perf_counter() - begin

    def synchronise(self) -> None:
        """Wait for what was begun: on a CPU all of it has ended."""

    def forget_failure(self) -> None:
        """Give back the memory that it took, as far as a cache holds it."""


class CudaClock:
    """Of a CUDA device."""

    timings = TIMINGS

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, call: Call, first: int, count: int) -> float:
        """Between two events around the calls."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        start.record()
        for i in range(first, first + count):
            call(i)
        stop.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(stop) * 1e-3

    def synchronise(self) -> None:
        torch.cuda.synchronize(self._device)

    def forget_failure(self) -> None:
        torch.cuda.empty_cache()

    def graph(self, make: Callable[[], Call], calls: int) -> Graph:
        """Capture calls 0 to `calls - 1` of what `make` returns. It is made on the stream of the
        capture too, since a backward runs on the stream of its forward."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            call = make()
            for i in range(WARM_UP_CALLS):
                call(i)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream):  # it waits, and frees what torch caches
            for i in range(calls):
                call(i)
        launches, unknown = None, None
        try:
            launches = _nodes(graph.raw_cuda_graph()) / calls
        except Exception as error:  # the time is what was asked for
            unknown = f"{type(error).__name__}: {error}"
        graph.instantiate()
        torch.cuda.synchronize(self._device)

        def replay(_: int, reads: Call = call) -> None:  # keeps the tensors that the graph reads
            graph.replay()

        return Graph(replay, calls, launches, unknown, graph.reset)

    def kernels(self, call: Call, count: int) -> list[Kernel]:
        """What `count` calls run on the device, the longest first."""
        call(0)
        torch.cuda.synchronize(self._device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for i in range(count):
                call(i)
            torch.cuda.synchronize(self._device)
        return _kernels(profile.events(), count)


def of(device: torch.device) -> HostClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


class DeviceLostError(RuntimeError):
    """A variant left the device so that nothing can run on it in this process."""

    def __init__(self, variant: str, reason: str) -> None:
        super().__init__(f"{variant} broke the device: {reason}")
        self.variant, self.reason = variant, reason


def lost(device: torch.device) -> str | None:
    """Why nothing can run on a device any more, as after a kernel that wrote where it must not;
    None if it can."""
    if device.type != "cuda":
        return None
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _nodes(raw_graph: int) -> int:
    """Kernels, copies and fills in a graph, by CUDA's driver."""
    count = ctypes.c_size_t(0)
    status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
        ctypes.c_void_p(raw_graph), None, ctypes.byref(count)
    )
    if status != 0:
        raise RuntimeError(f"cuGraphGetNodes returned {status}")
    return count.value


def _kernels(events: Sequence[Any], count: int) -> list[Kernel]:
    launches: dict[str, int] = {}
    time_us: dict[str, float] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            launches[event.name] = launches.get(event.name, 0) + 1
            time_us[event.name] = time_us.get(event.name, 0.0) + event.time_range.elapsed_us()
    if not launches:
        raise RuntimeError("the profiler reported no kernel")
    found = [Kernel(name, launches[name] / count, time_us[name] / count) for name in launches]
    return sorted(found, key=lambda kernel: -kernel.time_us)
