# SPDX-License-Identifier: Apache-2.0
"""Benchmark records: an op on a named shape, all variants in one run, with error, memory and where
it was measured.

Whatever fails is part of a record, with its reason, and what else was asked for is measured.
"""

from __future__ import annotations

import copy
import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kdkernels import _dispatch, _native
from kdkernels._version import __version__
from kdkernels.testing import bench, clock
from kdkernels.testing.limit import Limit
from kdkernels.testing.opinfo import BenchShape, OpInfo
from kdkernels.testing.work import Progress, Work

SCHEMA = 2


@cache
def environment(device_type: str) -> dict[str, Any]:
    """What a time depends on besides the code: no names of machines or people."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if _installed("triton") else None,
    }
    native = _native.build_module()
    facts["kdkernels_simd"] = None if isinstance(native, str) else native.simd_level()
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / bench.GIB, 1),
            "cuda": torch.version.cuda,
            "driver": _output(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            ),
        }
    return facts


def _cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _installed(distribution: str) -> bool:
    return any(
        found.metadata["Name"] == distribution
        for found in metadata.distributions(name=distribution)
    )


def _output(command: list[str], cwd: Path | None = None) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def version() -> dict[str, Any]:
    """The commit of a checkout, and whether the files differ from it; the release otherwise."""
    root = Path(__file__).parents[2]
    commit = (
        _output(["git", "rev-parse", "--short=12", "HEAD"], root)
        if (root / ".git").exists()
        else None
    )
    changes = (
        _output(["git", "status", "--porcelain", "--untracked-files=no"], root) if commit else None
    )
    return {"kdkernels": __version__, "commit": commit, "dirty": bool(changes) if commit else None}


def default_variants(info: OpInfo, device: torch.device) -> tuple[str, ...]:
    """The backends that `auto` considers on a device, the baselines and the peers."""
    return (*_dispatch.device_order(device), *info.baselines, *info.peers)


def run(
    info: OpInfo, shape: BenchShape, dtype: torch.dtype, mode: str, **options: Any
) -> dict[str, Any]:
    """The record of eager calls; arguments as of `records`."""
    (entry,) = records(info, shape, dtype, mode, **options)
    return entry


def records(
    info: OpInfo,
    shape: BenchShape,
    dtype: torch.dtype,
    mode: str,
    *,
    device: torch.device,
    timings: Sequence[str] = ("call",),
    variants: Sequence[str] | None = None,
    refused: dict[str, str] | None = None,
    seconds: float = 5.0,
    rounds: int | None = None,
    memory: bool = True,
    memory_limit: float | None = None,
    progress: Progress | None = None,
    limit: Limit | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure one shape: error against fp64, peak memory, time of all variants in turns, and the
    ratios between them. One record for each way of timing, as it ends.

    Args:
        info, shape, dtype, mode: What is measured; `mode` is one of `bench.MODES`.
        device: Where.
        timings: Of `clock.TIMINGS`; with "kernels" alone, neither error nor memory is measured.
        variants: Backends, baselines and peers; by default those of `default_variants`.
        refused: Variants that are not measured, and what is wrong with them.
        seconds: For all rounds together; at least five are made.
        rounds: Exactly so many instead.
        memory: Whether to measure peak memory, on the CPU in one process per variant.
        memory_limit: Bytes above which a variant is skipped; by default half of what is free.
        progress: Told what is being done.
        limit: After it nothing new begins, and what was not reached is said.

    Raises:
        DeviceLostError: after a variant nothing can run on the device.
    """
    work = Work(info, shape, dtype, mode, device, progress or (lambda what, share: None))
    limit = limit or Limit()
    ready = False
    for timing in (name for name in clock.TIMINGS if name in timings):
        late = limit.over()
        if late is not None:
            yield _entry(work, timing, not_reached=late)
            continue
        try:
            if not ready:
                asked = variants or default_variants(info, device)
                work.prepare(asked, refused or {}, memory_limit)
                if tuple(timings) != ("kernels",):
                    work.measure_errors()
                    if memory:
                        work.measure_memory()
                ready = True
        except clock.DeviceLostError:
            raise
        except Exception as error:  # of the shape itself, as its tensors on a full device
            yield _entry(work, timing, failed=bench.reason(error))
            continue
        with work.kept():
            try:
                work.time(timing, seconds, rounds)
            except clock.DeviceLostError:
                raise
            except Exception as error:
                yield _entry(work, timing, failed=bench.reason(error))
            else:
                yield _entry(work, timing)


def _entry(work: Work, timing: str, **ended: str) -> dict[str, Any]:
    """What is known; `ended` says why that is not all, under "failed" or "not_reached"."""
    info, shape, device = work.info, work.shape, work.device
    cost = info.cost(shape, work.dtype)
    facts = environment(device.type)
    return {
        "schema": SCHEMA,
        "op": info.name,
        "shape": {
            "name": shape.name,
            "sizes": shape.sizes,
            "workload": shape.workload,
            "options": shape.kwargs,
        },
        "dtype": str(work.dtype).removeprefix("torch."),
        "mode": work.mode,
        "timing": timing,
        "device": device.type,
        "device_name": facts.get("gpu", facts["cpu"]),
        "oracle": work.oracle,
        "flops": cost.flops,
        "bytes": cost.bytes,
        **ended,
        "variants": copy.deepcopy(work.results),
        "environment": facts,
        **version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
