# SPDX-License-Identifier: Apache-2.0
"""What a clock of a CUDA device asks of torch, faked on the host: events, streams, graphs, the
profiler, memory and the driver's count of a graph's nodes.

`installed(monkeypatch)` puts it in the place of torch's own, and returns what keeps count:

    fake = fake_cuda.installed(monkeypatch)
    CudaClock(torch.device("cuda")).graph(make, calls)
    assert fake.replays == 0

Time is the host's, and a replay takes `REPLAY_MS` more of it, since it runs nothing.
`on_host(info)` is an OpInfo whose tensors stay on the CPU whatever device they are asked for, so
that `record.records` and `kdkernels bench` run with the device "cuda". A process of its own, as of
a dry run of a script, takes `installed(pytest.MonkeyPatch())` and OpInfos from `on_host` in the
place of `kdkernels.testing.opinfo.opinfos`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdkernels.testing import clock, record
from kdkernels.testing.opinfo import OpInfo

CPU = torch.device("cpu")
REPLAY_MS = 1.0
NODES = 12  # of every graph
MIB = 1 << 20
# name, whether on the device, whether an annotation, microseconds
EVENTS = (
    ("fill", True, False, 2.0),
    ("product", True, False, 10.0),
    ("product", True, False, 20.0),
    ("aten::mm", False, False, 500.0),
    ("step", True, True, 500.0),
)


class Fake:
    """Events, graphs and what became of them."""

    def __init__(self) -> None:
        self.replays = self.resets = self.profiles = 0
        self.capturing = False
        self.captures: list[bool] = []  # for each graph, whether it was captured on a side stream
        self.events = EVENTS
        self.nodes_status = 0
        self.lost: str | None = None  # why nothing can run any more
        self._ahead_ms = 0.0
        self._stream: object = "default"

    def replay(self) -> None:
        assert not self.capturing
        self.replays += 1
        self._ahead_ms += REPLAY_MS

    def now_ms(self) -> float:
        return time.perf_counter() * 1e3 + self._ahead_ms

    def synchronize(self, device: Any = None) -> None:
        assert not self.capturing, "a capture cannot wait"

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Any:
        before, self._stream = self._stream, stream
        yield
        self._stream = before

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Any:
        self.capturing = True
        try:
            with self.stream(stream):
                yield
        finally:
            self.capturing = False
        self.captures.append(stream != "default")


def installed(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.ms = fake.now_ms()

        def elapsed_time(self, other: Any) -> float:
            return other.ms - self.ms

    class CUDAGraph:
        def __init__(self, keep_graph: bool) -> None:
            assert keep_graph, "or the driver has no graph to count"

        def raw_cuda_graph(self) -> int:
            return 1

        def instantiate(self) -> None:
            self.replay = fake.replay

        def reset(self) -> None:
            fake.resets += 1

    class Profile:
        def __init__(self, activities: Any) -> None:
            self._activities = activities

        def __enter__(self) -> Any:
            fake.profiles += 1
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def events(self) -> list[Any]:
            kinds = {True: torch.autograd.DeviceType.CUDA, False: torch.autograd.DeviceType.CPU}
            return [
                SimpleNamespace(
                    name=name, device_type=kinds[on_device], is_user_annotation=annotation,
                    time_range=SimpleNamespace(elapsed_us=lambda us=us: us),
                )
                for name, on_device, annotation, us in fake.events
            ]  # fmt: skip

    class Driver:
        def cuGraphGetNodes(self, graph: Any, nodes: None, count: Any) -> int:
            assert graph.value == 1
            count._obj.value = NODES
            return fake.nodes_status

    properties = SimpleNamespace(name="a GPU", L2_cache_size=1024, total_memory=80 << 30)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda device: (64 << 30, 80 << 30),
        "memory_allocated": lambda device: MIB,
        "max_memory_allocated": lambda device: 3 * MIB,
        "reset_peak_memory_stats": lambda device: None,
        "empty_cache": lambda: None,
        "synchronize": fake.synchronize,
        "current_stream": lambda device: "default",
        "Stream": lambda device: stream,
        "stream": fake.stream,
        "graph": fake.graph,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(clock, "lost", lambda device: fake.lost)
    monkeypatch.setattr(clock.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(record, "environment", record.environment.__wrapped__)  # nothing is kept
    return fake


def on_host(info: OpInfo, largest: int | None = None) -> OpInfo:
    """The same on the CPU, with no size above `largest`."""

    def moved(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(
            *(CPU if isinstance(arg, torch.device) else arg for arg in args)
        )

    shapes = info.bench
    if largest is not None:
        shapes = tuple(
            replace(shape, sizes={name: min(size, largest) for name, size in shape.sizes.items()})
            for shape in shapes
        )
    return replace(
        info, bench=shapes, bench_sample=moved(info.bench_sample), samples=moved(info.samples)
    )
