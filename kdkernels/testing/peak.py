# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of one call, above its inputs.

On a GPU the allocator knows. On the CPU a fresh process makes the call once and reads how much more
became resident than was with the inputs in place.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from kdkernels.testing import bench, fresh, resident
from kdkernels.testing.opinfo import BenchShape, opinfos

MIB = 1024.0**2


def why_not(device: torch.device) -> str | None:
    """Why peak memory cannot be measured on this machine; None if it can."""
    return resident.why_not() if device.type == "cpu" else None


def extra_mib(
    info_name: str,
    shape: BenchShape,
    dtype: torch.dtype,
    mode: str,
    variant: str,
    device: torch.device,
) -> float:
    """MiB that one call of a variant needs above its inputs; results and gradients count as
    extra."""
    if device.type == "cuda":
        return on_gpu(_call(info_name, shape, dtype, mode, variant, device), device)
    request = {
        "op": info_name,
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."), "mode": mode,
        "variant": variant, "threads": torch.get_num_threads(),
    }  # fmt: skip
    return fresh.call(__name__, "_in_this_process", request)


def _call(
    info_name: str,
    shape: BenchShape,
    dtype: torch.dtype,
    mode: str,
    variant: str,
    device: torch.device,
) -> Any:
    (info,) = (info for info in opinfos() if info.name == info_name)
    sample = bench.variant_sample(info, info.bench_sample(shape, device, dtype), variant)
    return bench.timed(bench.variant_function(info, sample, variant), [sample.args], mode, variant)


def on_gpu(call: bench.Call, device: torch.device) -> float:
    """MiB that a call needs above what its process holds."""
    call(0)  # compiles, and fills the caches that stay
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _in_this_process(request: dict[str, Any]) -> float:
    """MiB of a call on the CPU, in a process that has done nothing before."""
    torch.set_num_threads(request["threads"])
    shape, dtype = BenchShape(**request["shape"]), getattr(torch, request["dtype"])
    rest = (dtype, request["mode"], request["variant"], torch.device("cpu"))
    if request["variant"] != "compile":
        # libraries, threads and their buffers are no part of the call's memory
        small = BenchShape(
            shape.name,
            {name: min(size, 96) for name, size in shape.sizes.items()},
            "",
            shape.kwargs,
        )
        _call(request["op"], small, *rest)(0)
    call = _call(request["op"], shape, *rest)
    if request["variant"] == "compile":
        call(0)  # the compiler's own memory, at the size that it specialises on
    return resident.extra_bytes(lambda: call(0)) / MIB
