# SPDX-License-Identifier: Apache-2.0
"""Hardware counters of the kernels that the table's calls spend their time in, by Nsight Compute.

    python benchmarks/counters.py --table kernels.jsonl --lines counters.jsonl --limit 60

reads what `kdkernels bench --table --mode kernels --lines kernels.jsonl` found, and takes the
longest kernel of each backend's calls, of those the eight longest of different names. Their calls
are made under `ncu`, which leaves the clocks as they are. Each kernel is a process and a line of
its own, so that a run which is stopped keeps what it has. A model of a kernel's time (which unit is
busy, how many bytes go through L2) is held against these numbers.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

MOST = 8
BACKENDS = ("triton", "cuda")
# Tables of ncu that every version has, and numbers beside them that a chip may not have.
SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables", "Occupancy", "LaunchStats",
)  # fmt: skip
METRICS = (
    "gpu__time_duration.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__waves_per_multiprocessor",
)


@dataclass(frozen=True)
class Counted:
    """A kernel, and the call that launches it."""

    op: str
    shape: str
    dtype: str
    mode: str
    backend: str
    kernel: str  # its function, without namespaces, template arguments and parameters
    time_us: float  # of all its launches in the call


def function_name(kernel: str) -> str:
    """What `ncu --kernel-name` matches of a name in the profiler's words."""
    plain = re.split(r"[<(]", kernel.replace("(anonymous namespace)", ""), maxsplit=1)[0]
    return re.split(r"[:\s]+", plain)[-1]


def choose(lines: Iterable[str]) -> list[Counted]:
    """The longest kernels of the calls in the records of a benchmark, the longest first."""
    longest: dict[str, Counted] = {}
    for line in lines:
        record = json.loads(line)
        if record.get("timing") != "kernels":
            continue
        for backend in BACKENDS:
            for kernel in record["variants"].get(backend, {}).get("kernels", ())[:1]:
                name = function_name(kernel["name"])
                found = Counted(
                    record["op"], record["shape"]["name"], record["dtype"], record["mode"], backend,
                    name, kernel["time_us"],
                )  # fmt: skip
                if name not in longest or longest[name].time_us < found.time_us:
                    longest[name] = found
    return sorted(longest.values(), key=lambda counted: -counted.time_us)[:MOST]


def count(counted: Counted, metrics: Sequence[str], seconds: float) -> dict[str, str] | str:
    """Counters of one launch, by name, each with its unit; or why there are none."""
    command = [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
        "--kernel-name", f"regex:^{re.escape(counted.kernel)}$", "--launch-count", "1",
    ]  # fmt: skip
    for section in SECTIONS:
        command += ["--section", section]
    if metrics:
        command += ["--metrics", ",".join(metrics)]
    call = (counted.op, counted.shape, counted.dtype, counted.mode, counted.backend)
    command += [sys.executable, __file__, "--call", *call]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(seconds, 1.0)
        )
    except subprocess.TimeoutExpired:
        return f"ncu took more than {seconds:.0f} s"
    rows = list(csv.reader(line for line in done.stdout.splitlines() if line.startswith('"')))
    if done.returncode != 0 or len(rows) < 3:
        said = " ".join((done.stdout + done.stderr).split())
        return f"ncu ended with status {done.returncode}: {said[-500:]}"
    names, units, values = rows[:3]
    return {
        name: f"{value} {unit}".strip()
        for name, unit, value in zip(names, units, values, strict=False)
        if value
    }


def call_once(op: str, shape_name: str, dtype_name: str, mode: str, backend: str) -> int:
    """The call that ncu looks at: warmed up, then once between the marks of its range."""
    import torch

    from kdkernels.testing import bench
    from kdkernels.testing.opinfo import opinfos

    (info,) = (info for info in opinfos() if info.name == op)
    (shape,) = (shape for shape in info.bench if shape.name == shape_name)
    sample = info.bench_sample(shape, torch.device("cuda"), getattr(torch, dtype_name))
    function = bench.variant_function(info, sample, backend)
    run = bench.timed(function, [sample.args], mode, backend)
    run(0)
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        run(0)
        torch.cuda.synchronize()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, default=Path("kernels.jsonl"))
    parser.add_argument("--lines", type=Path, default=Path("counters.jsonl"))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds (default: 600)")
    parser.add_argument("--call", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call is not None:
        return call_once(*args.call)
    end = time.monotonic() + args.limit
    if shutil.which("ncu") is None:
        parser.error("ncu, of Nsight Compute, was not found")
    if not args.table.exists():
        parser.error(f"--table must be records of kdkernels bench, but there is no {args.table}")
    with args.table.open() as table:
        chosen = choose(table)
    # a metric that a chip does not have fails the whole run, and the sections alone are asked for
    ways, failures = [METRICS, ()], 0
    with args.lines.open("w") as lines:
        for counted in chosen:
            entry: dict[str, object] = asdict(counted)
            for metrics in list(ways):
                found = count(counted, metrics, end - time.monotonic())
                if not isinstance(found, str):
                    entry["counters"] = found
                    break
                entry["failed"] = found
                ways = ways[-1:]
            if "counters" in entry and "failed" in entry:
                entry["without_metrics"] = entry.pop("failed")
            failures += "failed" in entry
            lines.write(json.dumps(entry) + "\n")
            lines.flush()
            print(*asdict(counted).values(), entry.get("failed", "counted"), flush=True)
            if time.monotonic() > end:
                break
    print(f"{len(chosen)} kernels chosen, {failures} failed")
    return 1 if failures or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
