# SPDX-License-Identifier: Apache-2.0
"""One benchmark record: an op on a named shape, all variants in one run, with error, memory and
where it was measured."""

from __future__ import annotations

import datetime
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kdkernels import _dispatch, _native
from kdkernels._version import __version__
from kdkernels.testing import bench, peak, peers
from kdkernels.testing.opinfo import BenchShape, OpInfo

SCHEMA = 1
Progress = Callable[[str, float], None]  # what is being done, and the finished share of it


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
    info: OpInfo,
    shape: BenchShape,
    dtype: torch.dtype,
    mode: str,
    *,
    device: torch.device,
    variants: Sequence[str] | None = None,
    seconds: float = 5.0,
    rounds: int | None = None,
    memory: bool = True,
    memory_limit: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure one shape: time of all variants in turns, error against fp64, peak memory, and the
    ratios between them.

    Args:
        info, shape, dtype, mode: What is measured; `mode` is one of `bench.MODES`.
        device: Where.
        variants: Backends, baselines and peers; by default those of `default_variants`.
        seconds: For all rounds together; at least five are made.
        rounds: Exactly so many instead.
        memory: Whether to measure peak memory, on the CPU in one process per variant.
        memory_limit: Bytes above which a variant is skipped; by default half of what is free.
        progress: Told what is being done.
    """
    say = progress or (lambda what, share: None)
    sample = info.bench_sample(shape, device, dtype)
    limit = bench.memory_limit(device) if memory_limit is None else memory_limit
    results: dict[str, dict[str, Any]] = {}
    asked = list(variants or default_variants(info, device))
    for name in asked:
        reason = bench.why_skip(info, shape, sample, name, dtype, limit, mode)
        results[name] = {} if reason is None else {"skipped": reason}
        if reason is None and name in info.peers:
            results[name] = {
                "version": peers.version(name),
                "computes": peers.get(info, name).computes,
            }
    able = [name for name in asked if "skipped" not in results[name]]
    if "mm" in asked and "mm" not in able:
        able.append("mm_part")
        results["mm_part"] = {}
    torch._dynamo.reset()
    functions = {name: bench.variant_function(info, sample, name) for name in able}
    prepared = {name: bench.variant_sample(info, sample, name) for name in able}

    say("error", 0.0)
    truth = bench.oracle(info, shape, sample)
    timed = [name for name in able if not name.startswith("mm")]
    judged = [n for n in timed if n not in info.peers or peers.get(info, n).whole]
    for i, name in enumerate(judged):
        errors = bench.relative_errors(functions[name], prepared[name], truth, info.diff_args[0])
        # JSON has no NaN; a baseline in half precision may overflow
        results[name]["error"] = {
            what: e if math.isfinite(e) else str(e) for what, e in errors.items()
        }
        say("error", (i + 1) / len(judged))
    oracle_name = truth.name
    del truth

    calls = {}
    for name in able:
        calls[name] = bench.timed(
            functions[name], bench.input_sets(prepared[name], device), mode, name
        )
    say("time", 0.0)
    exactly = {} if rounds is None else {"min_rounds": rounds, "max_rounds": rounds}
    timings = bench.measure(
        calls, seconds=seconds, device=device, on_round=lambda share: say("time", share), **exactly
    )
    products = {
        name: info.product.flops(*prepared[name].args) for name in able if name.startswith("mm")
    }
    for name, timing in timings.items():
        results[name]["time_us"] = {
            key: round(value, 2) for key, value in asdict(timing).items() if key != "rounds"
        }
        results[name]["rounds"] = timing.rounds
    del calls, prepared
    if memory:
        _add_memory(info, shape, dtype, mode, device, timed, results, say)
    _add_ratios(info, shape, dtype, mode, products, results)
    cost = info.cost(shape, dtype)
    return {
        "schema": SCHEMA,
        "op": info.name,
        "shape": {
            "name": shape.name,
            "sizes": shape.sizes,
            "workload": shape.workload,
            "options": shape.kwargs,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "device": device.type,
        "oracle": oracle_name,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "variants": results,
        "environment": environment(device.type),
        **version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _add_memory(
    info: OpInfo,
    shape: BenchShape,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
    names: Sequence[str],
    results: dict[str, dict[str, Any]],
    say: Progress,
) -> None:
    reason = peak.why_not(device)
    for i, name in enumerate(names):
        say("memory", i / len(names))
        if reason is None:
            results[name]["peak_extra_mib"] = round(
                peak.extra_mib(info.name, shape, dtype, mode, name, device), 1
            )
        else:
            results[name]["peak_extra_mib_skipped"] = reason
    say("memory", 1.0)


def _add_ratios(
    info: OpInfo,
    shape: BenchShape,
    dtype: torch.dtype,
    mode: str,
    products: dict[str, float],
    results: dict[str, dict[str, Any]],
) -> None:
    """Speed-up over eager and over each peer, time in units of the product, and the share of the
    limit that is reached. `products` are the operations of each product timed."""
    median = {
        name: result["time_us"]["p50"] for name, result in results.items() if "time_us" in result
    }
    rate = None  # flops per microsecond
    for name, flops in products.items():
        rate = flops / median[name]
        results[name]["gflops_per_second"] = round(rate * 1e-3, 1)
    for name, time_us in median.items():
        if name.startswith("mm"):
            continue
        if "eager" in median:
            results[name]["speedup_over_eager"] = round(median["eager"] / time_us, 3)
        over = {peer: median[peer] / time_us for peer in info.peers if peer in median}
        if over and name not in info.peers:
            results[name]["speedup_over"] = {peer: round(x, 3) for peer, x in over.items()}
        if "mm" in median:
            results[name]["times_mm"] = round(time_us / median["mm"], 3)
        if rate is not None and mode == "fwd_bwd":
            results[name]["percent_of_limit"] = round(
                100 * info.cost(shape, dtype).flops / rate / time_us, 1
            )
