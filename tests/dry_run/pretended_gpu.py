# SPDX-License-Identifier: Apache-2.0
"""A GPU for the dry run of benchmarks/run_on_gpu.sh: the CPU under the name "cuda", and small
work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20,
    total_memory=141 << 30, shared_memory_per_block_optin=232448,
)  # fmt: skip
OP, SHAPE = "gram_mse", "layer4"
MOST = 16  # of any size of the shape
DTYPES = {torch.float32}  # of samples


class CudaIsTheCpu(TorchFunctionMode):
    """Every torch function that is told a CUDA device takes the CPU instead."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = torch.device("cpu")
        return function(*map(_on_cpu, args), **kwargs)


def _on_cpu(value: Any) -> Any:
    cuda = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if cuda else value


class Clock:
    """In the place of `kdkernels.testing.clock.CudaClock`: the host's time, under all names."""

    timings = ("graph", "call", "kernels")

    def __init__(self, device: torch.device) -> None:
        pass

    def seconds(self, call: Callable[[int], Any], first: int, count: int) -> float:
        begin = time.perf_counter()
        for i in range(first, first + count):
            call(i)
        return time.perf_counter() - begin

    def synchronise(self) -> None:
        pass

    def forget_failure(self) -> None:
        pass

    def graph(self, make: Callable[[], Callable[[int], Any]], calls: int) -> Any:
        from kdkernels.testing.clock import Graph

        call = make()

        def replay(_: int) -> None:
            for i in range(calls):
                call(i)

        return Graph(replay, calls, 1.0, None, lambda: None)

    def kernels(self, call: Callable[[int], Any], count: int) -> list[Any]:
        from kdkernels.testing.clock import Kernel

        call(0)
        return [Kernel("void kdk::(anonymous namespace)::pretended_kernel<1>(int)", 1.0, 2.0)]


def use(compiled: bool) -> None:
    """For the rest of this process. `compiled`: Triton's kernels are not interpreted."""
    _torch()
    _small_work()
    if compiled:
        _triton()


def _torch() -> None:
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": H200,
        "mem_get_info": (64 << 30, 141 << 30),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.profiler = SimpleNamespace(profile=contextlib.nullcontext)
    CudaIsTheCpu().__enter__()
    torch.set_num_threads(1)


def _small_work() -> None:
    from kdkernels.testing import bench, clock, gpu_table, opinfo, tiles

    small = tuple(_small(info) for info in opinfo.opinfos() if info.name == OP)
    opinfo.opinfos = lambda: small
    gpu_table.GPU_TABLE = ((OP, SHAPE, "fwd_bwd"),)
    clock.CudaClock = Clock
    measure, input_sets = bench.measure, bench.input_sets
    candidates = tiles.Chooser.candidates
    bench.measure = lambda variants, **options: measure(
        variants, **{**options, "seconds": 0.01, "warm_up_seconds": 0.0, "min_rounds": 1}
    )
    # on a GPU as many as exceed its cache
    bench.input_sets = lambda sample, device: input_sets(sample, torch.device("cpu"))
    tiles.Chooser.candidates = lambda *args: candidates(*args)[:1]


def _small(info: Any) -> Any:
    """One sample in one dtype, and shapes of a few numbers."""

    def samples(device: torch.device, dtype: torch.dtype) -> list[Any]:
        found = [sample for sample in info.samples(device, dtype) if sample.args[0].numel()]
        return [min(found, key=lambda sample: sample.args[0].numel())]

    shapes = [
        replace(shape, sizes={name: min(size, MOST) for name, size in shape.sizes.items()})
        for shape in info.bench
    ]
    dtypes = tuple(dtype for dtype in info.dtypes if dtype in DTYPES)
    return replace(info, samples=samples, bench=tuple(shapes), dtypes=dtypes)


def _triton() -> None:
    """Launches reach a driver that drops them."""
    from triton.runtime.driver import driver

    import kdkernels.triton
    from kdkernels.testing.no_launches import Driver

    driver.set_active(Driver())
    kdkernels.triton.rejects = lambda tensors: None
