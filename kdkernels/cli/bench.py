# SPDX-License-Identifier: Apache-2.0
"""Time, memory and error of the ops against eager PyTorch, torch.compile, the matrix products of
the obvious way and other libraries.

A backend is timed only if it passes some samples of the op first. What fails, by a wrong result or
by any exception, is in the records with its reason, and all else is timed. Exit status 1 if a
backend of this package failed.

examples:
  kdkernels bench --op gram_mse --shape pooled
  kdkernels bench --mode fwd bwd                 the parts of a step
  kdkernels bench --mode graph kernels           on a GPU: replayed graphs, and single kernels
  kdkernels bench --device cuda --table --lines table.jsonl --limit 150"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdkernels import _dispatch
from kdkernels._progress import Progress
from kdkernels.cli import UsageError, _bench_report, lines
from kdkernels.cli.lines import Lines, positive
from kdkernels.cli.table import write_json
from kdkernels.testing import bench, clock, record
from kdkernels.testing.gpu_table import GPU_TABLE
from kdkernels.testing.limit import Limit
from kdkernels.testing.opinfo import BenchShape, OpInfo, opinfos

NAME = "bench"
HELP = "time the ops against eager PyTorch, torch.compile and one matrix product"
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
TABLE_VARIANTS = ("triton", "cuda", "eager", "mm")
GATE = "a result is wrong: "
DEFAULT_TIMINGS = {"cuda": ("graph", "call"), "cpu": ("call",)}
SWEEP_ROWS = tuple(2**k for k in range(8, 15))
SWEEP_WIDTH = 512
SWEEP_LIMIT_BYTES = 8 * bench.GIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [info.name for info in opinfos()]
    parser.add_argument("--op", nargs="+", choices=names, default=names, help="ops (default: all)")
    parser.add_argument(
        "--shape", nargs="+", metavar="NAME", help="named shapes, see --list (default: all)"
    )
    parser.add_argument(
        "--table", action="store_true",
        help="the shapes that have a target on a GPU, in bf16, against eager mode and the products "
        f"alone (backends {' '.join(TABLE_VARIANTS)})",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: fp32, or bf16 with --table"
    )
    parser.add_argument(
        "--mode", nargs="+", choices=(*bench.MODES, *clock.TIMINGS), default=[],
        help="what is timed (default: fwd_bwd): a step or its parts; and how (default: graph and "
        "call on a GPU, call on a CPU): a replayed CUDA graph, calls from Python, or each kernel "
        "by the profiler",
    )  # fmt: skip
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=(
            *_dispatch.BACKENDS,
            *bench.BASELINES,
            *sorted({peer for info in opinfos() for peer in info.peers}),
        ),
        help="backends, baselines and other libraries (default: the backends of the device, and "
        "all that the op is compared with)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=positive(int), help="rounds of every shape")
    length.add_argument(
        "--time", type=positive(float), default=5.0, help="seconds of every shape (default: 5)"
    )
    parser.add_argument(
        "--memory-limit", type=positive(float), metavar="GIB", help="skip what needs more"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument(
        "--sweep", action="store_true", help=f"a sweep over the batch size at D = {SWEEP_WIDTH}"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write the records and plots there"
    )
    parser.add_argument(
        "--json", metavar="FILE", help='write the records as JSON; "-" is standard output'
    )
    lines.add_arguments(parser, "measurement")
    parser.add_argument("--list", action="store_true", help="print ops and shapes, and stop")


def run(args: argparse.Namespace) -> int:
    infos = [info for info in opinfos() if info.name in args.op]
    if args.list:
        _list(infos)
        return 0
    limit = Limit(args.limit)
    device = _device(args)
    plan = _plan(infos, args, device)
    if not plan and args.shape is None:
        raise UsageError(f"--table has no shape of {', '.join(args.op)}")
    if not plan:
        raise UsageError(
            f"--shape must name a shape for {device.type}, see --list, got {' '.join(args.shape)}"
        )
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    gates: dict[tuple[str, str], dict[str, str]] = {}
    with Progress(len(plan), "bench") as progress, Lines(args.lines) as out:
        for work in plan:
            progress.note(f"{work} ...")
            key = work.info.name, work.dtype
            if key not in gates and limit.over() is None:
                gates[key] = _gate(work, args, device, out)
                failed += gates[key].values()
            for entry in record.records(
                work.info, work.shape, DTYPES[work.dtype], work.part,
                device=device,
                timings=work.timings,
                variants=_variants(work.info, args, device),
                refused=gates.get(key, {}),
                seconds=args.time,
                rounds=args.rounds,
                memory=not args.no_memory,
                memory_limit=_memory_limit(args),
                progress=lambda what, share, title=str(work): progress.step(
                    f"{title}: {what} {share:.0%}", count=0
                ),
                limit=limit,
            ):  # fmt: skip
                records.append(entry)
                out.write(entry)
                failed += _failures(entry)
                progress.note(_text(entry))
                # after each record, so that an interrupted run keeps what it has
                if args.output is not None:
                    args.output.mkdir(parents=True, exist_ok=True)
                    path = args.output / f"{_stem(args, device)}.json"
                    write_json({"records": records}, str(path))
            progress.step(str(work))
    if args.json:
        write_json({"records": records}, args.json)
    if args.output is not None:
        _write_plots(records, args.output, sweep=args.sweep)
    for text in dict.fromkeys(failed):
        print(f"FAIL {text}", file=sys.stderr)
    return 1 if failed else 0


def _text(entry: dict[str, Any]) -> str:
    ended = [f"{key}: {entry[key]}" for key in ("failed", "not_reached") if key in entry]
    table = _bench_report.table(entry).render()
    return "\n".join((table, *ended, *_bench_report.footnotes(entry), ""))


def _failures(entry: dict[str, Any]) -> list[str]:
    """What went wrong in a record that is the fault of this package."""
    where = f"{entry['op']} {entry['shape']['name']} {entry['dtype']} {entry['timing']}"
    found = [f"{where}: {entry['failed']}"] if "failed" in entry else []
    for name, result in entry["variants"].items():
        reason = result.get("failed") or result.get("error_failed")
        if name in _dispatch.BACKENDS and reason and not reason.startswith(GATE):
            found.append(f"{where} on {name}: {reason}")
    return found


def _device(args: argparse.Namespace) -> torch.device:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.table and name != "cuda":
        raise UsageError(f"--table needs a GPU, got the device {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device must be cpu here, since torch sees no GPU, got cuda")
    return torch.device(name)


def _memory_limit(args: argparse.Namespace) -> float | None:
    if args.memory_limit is not None:
        return args.memory_limit * bench.GIB
    return SWEEP_LIMIT_BYTES if args.sweep else None


def _list(infos: Sequence[OpInfo]) -> None:
    for info in infos:
        print(info.name)
        for shape in info.bench:
            only = f" ({shape.device} only)" if shape.device else ""
            print(f"  {shape.name:<14} {_sizes(shape):<22} {shape.workload}{only}")


def _sizes(shape: BenchShape) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.sizes.items())


@dataclass(frozen=True)
class _Planned:
    """A measurement of one shape."""

    info: OpInfo
    shape: BenchShape
    dtype: str
    part: str  # of `bench.MODES`
    timings: tuple[str, ...]

    def __str__(self) -> str:
        what = f"{self.info.name} {self.shape.name} {_sizes(self.shape)}"
        return f"{what} {self.dtype} {self.part} by {', '.join(self.timings)}"


def _plan(
    infos: Sequence[OpInfo], args: argparse.Namespace, device: torch.device
) -> list[_Planned]:
    parts = [mode for mode in args.mode if mode in bench.MODES]
    plan = [
        (info, shape, dtype, part)
        for info in infos
        for shape, of_table in _shapes(info, args, device)
        for dtype in args.dtype or (["bf16"] if args.table else ["fp32"])
        for part in parts or of_table
    ]
    if args.table:  # those first that are most asked for
        order = [(op, name) for op, name, _ in GPU_TABLE]
        plan.sort(key=lambda what: order.index((what[0].name, what[1].name)))
    # a process that has profiled is slower afterwards
    timings = _timings(args, device)
    first, last = (
        tuple(name for name in timings if (name == "kernels") is profiled)
        for profiled in (False, True)
    )
    return [_Planned(*what, of) for of in (first, last) if of for what in plan]


def _timings(args: argparse.Namespace, device: torch.device) -> tuple[str, ...]:
    able = clock.of(device).timings
    asked = [mode for mode in args.mode if mode in clock.TIMINGS]
    for mode in asked:
        if mode not in able:
            raise UsageError(f"--mode {mode} needs a GPU, got the device {device.type}")
    return tuple(asked) or DEFAULT_TIMINGS[device.type]


def _shapes(
    info: OpInfo, args: argparse.Namespace, device: torch.device
) -> list[tuple[BenchShape, Sequence[str]]]:
    """The shapes asked for, and the parts of a step that are timed where none are asked for."""
    if args.sweep:
        base = info.bench[0]
        return [
            (
                replace(
                    base,
                    name=f"rows_{B}",
                    sizes={**base.sizes, "B": B, "D": SWEEP_WIDTH},
                    workload="sweep",
                ),
                ("fwd_bwd",),
            )
            for B in SWEEP_ROWS
        ]
    found = []
    for shape in info.bench:
        parts = [part for op, name, part in GPU_TABLE if (op, name) == (info.name, shape.name)]
        named = args.shape is None or shape.name in args.shape
        if named and shape.device in (None, device.type) and (parts or not args.table):
            found.append((shape, parts if args.table else ["fwd_bwd"]))
    return found


def _variants(info: OpInfo, args: argparse.Namespace, device: torch.device) -> Sequence[str]:
    if args.backend is None and args.table:
        return TABLE_VARIANTS
    return args.backend or record.default_variants(info, device)


def _gate(
    work: _Planned, args: argparse.Namespace, device: torch.device, out: Lines
) -> dict[str, str]:
    """What is wrong with each backend: nothing is timed that misses its error budget."""
    wrong = {}
    for backend in _variants(work.info, args, device):
        if backend not in _dispatch.BACKENDS:
            continue
        if isinstance(_dispatch.implementation(work.info.op, backend), str):
            continue  # absent: the record says so
        try:
            found = bench.gate(work.info, backend, device, DTYPES[work.dtype])
        except Exception as error:  # of a device that is broken
            found = [bench.reason(error)]
        key = {"op": work.info.name, "backend": backend, "dtype": work.dtype}
        out.write({"gate": not found, **key, "wrong": found})
        if found:
            wrong[backend] = f"{GATE}{'; '.join(found)}"
    return wrong


def _stem(args: argparse.Namespace, device: torch.device) -> str:
    return f"{'sweep' if args.sweep else 'bench'}_{device.type}"


def _write_plots(records: Sequence[dict[str, Any]], folder: Path, sweep: bool) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots", file=sys.stderr)
        return
    from kdkernels.cli import _plots

    # one way of timing, the one that is closest to the device
    shown = next((t for t in ("graph", "call") if any(r["timing"] == t for r in records)), None)
    drawn = [entry for entry in records if entry["timing"] == shown]
    for path in _plots.draw(drawn, folder, sweep=sweep):
        print(f"wrote {path}", file=sys.stderr)
