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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdkernels import _dispatch
from kdkernels._progress import Progress
from kdkernels.cli import UsageError, _bench_report, lines
from kdkernels.cli._bench_findings import DTYPE_NAMES, Findings, Planned, sizes
from kdkernels.cli.lines import Lines, positive
from kdkernels.cli.table import write_json
from kdkernels.testing import bench, clock, record
from kdkernels.testing.gpu_table import GPU_TABLE
from kdkernels.testing.limit import Limit
from kdkernels.testing.opinfo import BenchShape, OpInfo, opinfos

NAME = "bench"
HELP = "time the ops against eager PyTorch, torch.compile and one matrix product"
TABLE_VARIANTS = ("triton", "cuda", "eager", "mm")
MOST_LOST = 20  # processes that may go on with the rest
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
        "--dtype", nargs="+", choices=DTYPE_NAMES, help="default: fp32, or bf16 with --table"
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
    with Progress(len(plan), "bench") as progress, Lines(args.lines, args.resume) as out:
        found = Findings(out)
        for work in plan:
            progress.note(f"{work} ...")
            try:
                _measure(work, args, device, limit, found, progress)
            except clock.DeviceLostError as lost:
                found.lose(work, lost)
                progress.note(str(lost))
                if args.lines and len(found.lost) < MOST_LOST:
                    lines.start_anew(args.words, limit)
            progress.step(str(work))
    if args.json:
        write_json({"records": found.records}, args.json)
    if args.output is not None:
        _write_plots(found.records, args.output, sweep=args.sweep)
    failed = found.failures()
    for text in failed:
        print(f"FAIL {text}", file=sys.stderr)
    return 1 if failed else 0


def _measure(
    work: Planned,
    args: argparse.Namespace,
    device: torch.device,
    limit: Limit,
    found: Findings,
    progress: Progress,
) -> None:
    timings = found.missing(work)
    if timings and limit.over() is None:
        _gate(work, args, device, found)
    for entry in record.records(
        work.info, work.shape, work.torch_dtype, work.part,
        device=device,
        timings=timings,
        variants=_variants(work.info, args, device),
        refused=found.refused(work),
        seconds=args.time,
        rounds=args.rounds,
        memory=not args.no_memory,
        memory_limit=_memory_limit(args),
        progress=lambda what, share: progress.step(f"{work}: {what} {share:.0%}", count=0),
        limit=limit,
    ):  # fmt: skip
        found.add(entry)
        progress.note(_text(entry))
        # after each record, so that an interrupted run keeps what it has
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            path = args.output / f"{_stem(args, device)}.json"
            write_json({"records": found.records}, str(path))


def _text(entry: dict[str, Any]) -> str:
    ended = [f"{key}: {entry[key]}" for key in ("failed", "not_reached") if key in entry]
    table = _bench_report.table(entry).render()
    return "\n".join((table, *ended, *_bench_report.footnotes(entry), ""))


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
            print(f"  {shape.name:<14} {sizes(shape):<22} {shape.workload}{only}")


def _plan(infos: Sequence[OpInfo], args: argparse.Namespace, device: torch.device) -> list[Planned]:
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
    return [Planned(*what, of) for of in (first, last) if of for what in plan]


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


def _gate(work: Planned, args: argparse.Namespace, device: torch.device, found: Findings) -> None:
    """Find what is wrong with each backend: nothing is timed that misses its error budget."""
    for backend in _variants(work.info, args, device):
        key = work.info.name, backend, work.dtype
        if backend not in _dispatch.BACKENDS or key in found.gates:
            continue
        if isinstance(_dispatch.implementation(work.info.op, backend), str):
            continue  # absent: the record says so
        try:
            wrong = bench.gate(work.info, backend, device, work.torch_dtype)
        except Exception as error:  # of the samples themselves
            wrong = [bench.reason(error)]
        found.add_gate(*key, wrong)
        lost = clock.lost(device) if wrong else None
        if lost is not None:
            raise clock.DeviceLostError(backend, lost)


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
