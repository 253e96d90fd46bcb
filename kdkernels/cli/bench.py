# SPDX-License-Identifier: Apache-2.0
"""`kdkernels bench`: time, memory and error of the ops against eager PyTorch, torch.compile, the
matrix products of the obvious way and other libraries."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdkernels import _dispatch
from kdkernels._progress import Progress
from kdkernels.cli import UsageError
from kdkernels.cli.table import Table, write_json
from kdkernels.testing import bench, record
from kdkernels.testing.opinfo import BenchShape, OpInfo, opinfos

NAME = "bench"
HELP = "time the ops against eager PyTorch, torch.compile and one matrix product"
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
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
        "--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="default: fp32"
    )
    parser.add_argument(
        "--mode", nargs="+", choices=bench.MODES, default=["fwd_bwd"], help="default: fwd_bwd"
    )
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
    length.add_argument("--rounds", type=_positive(int), help="rounds of every shape")
    length.add_argument(
        "--time", type=_positive(float), default=5.0, help="seconds of every shape (default: 5)"
    )
    parser.add_argument(
        "--memory-limit", type=_positive(float), metavar="GIB", help="skip what needs more"
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
    parser.add_argument("--list", action="store_true", help="print ops and shapes, and stop")


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse


def run(args: argparse.Namespace) -> int:
    infos = [info for info in opinfos() if info.name in args.op]
    if args.list:
        _list(infos)
        return 0
    device = _device(args)
    plan = _plan(infos, args, device)
    if not plan:
        raise UsageError(
            f"--shape must name a shape for {device.type}, see --list, got {' '.join(args.shape)}"
        )
    wrong = _gate(infos, args, device)
    if wrong:
        print("nothing was timed, because results are wrong:", *wrong, sep="\n", file=sys.stderr)
        return 1
    records: list[dict[str, Any]] = []
    with Progress(len(plan), "bench") as progress:
        for info, shape, dtype, mode in plan:
            title = f"{info.name} {shape.name} {_sizes(shape)} {dtype} {mode}"
            progress.note(f"{title} ...")
            entry = record.run(
                info,
                shape,
                DTYPES[dtype],
                mode,
                device=device,
                variants=args.backend,
                seconds=args.time,
                rounds=args.rounds,
                memory=not args.no_memory,
                memory_limit=_memory_limit(args),
                progress=lambda what, share, title=title: progress.step(
                    f"{title}: {what} {share:.0%}", count=0
                ),
            )
            records.append(entry)
            progress.step(title)
            progress.note("\n".join((_table(entry).render(), *_footnotes(entry), "")))
            # after each record, so that an interrupted run keeps what it has
            if args.output is not None:
                args.output.mkdir(parents=True, exist_ok=True)
                write_json({"records": records}, str(args.output / f"{_stem(args, device)}.json"))
    if args.json:
        write_json({"records": records}, args.json)
    if args.output is not None:
        _write_plots(records, args.output, sweep=args.sweep)
    return 0


def _device(args: argparse.Namespace) -> torch.device:
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
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


def _plan(
    infos: Sequence[OpInfo], args: argparse.Namespace, device: torch.device
) -> list[tuple[OpInfo, BenchShape, str, str]]:
    plan = []
    for info in infos:
        shapes: list[BenchShape]
        if args.sweep:
            base = info.bench[0]
            shapes = [
                replace(
                    base,
                    name=f"rows_{B}",
                    sizes={**base.sizes, "B": B, "D": SWEEP_WIDTH},
                    workload="sweep",
                )
                for B in SWEEP_ROWS
            ]
        else:
            shapes = [
                shape
                for shape in info.bench
                if (args.shape is None or shape.name in args.shape)
                and shape.device in (None, device.type)
            ]
        plan += [
            (info, shape, dtype, mode)
            for shape in shapes
            for dtype in args.dtype
            for mode in args.mode
        ]
    return plan


def _gate(infos: Sequence[OpInfo], args: argparse.Namespace, device: torch.device) -> list[str]:
    """What is wrong: nothing is timed that misses its error budget."""
    wrong = []
    for info in infos:
        asked = args.backend or record.default_variants(info, device)
        for backend in (name for name in asked if name in _dispatch.BACKENDS):
            if isinstance(_dispatch.implementation(info.op, backend), str):
                continue  # absent: the record says so
            for dtype in args.dtype:
                wrong += bench.gate(info, backend, device, DTYPES[dtype])
    return wrong


HEADERS = (
    "variant",
    "time",
    "p20",
    "p80",
    "x eager",
    "x mm",
    "% limit",
    "loss error",
    "gradient error",
    "MiB",
    "note",
)


def _cells(name: str, result: dict[str, Any], peers: Sequence[str]) -> list[str]:
    def number(key: str, form: str) -> str:
        return format(result[key], form) if key in result else "-"

    times = [
        _duration(result["time_us"][key]) if "time_us" in result else "-"
        for key in ("p50", "p20", "p80")
    ]
    errors = [
        e if isinstance(e, str) else f"{e:.1e}" for e in result.get("error", {}).values()
    ] or ["-", "-"]
    ratios = (
        number("speedup_over_eager", ".2f"),
        *(
            format(result["speedup_over"][peer], ".2f") if "speedup_over" in result else "-"
            for peer in peers
        ),
        number("times_mm", ".2f"),
        number("percent_of_limit", ".0f"),
    )
    note = result.get("skipped", result.get("peak_extra_mib_skipped", ""))
    return [name, *times, *ratios, *errors, number("peak_extra_mib", ".1f"), note]


def _duration(time_us: float) -> str:
    for limit, factor, unit in ((1e3, 1.0, "us"), (1e6, 1e-3, "ms")):
        if time_us < limit:
            return f"{time_us * factor:.3g} {unit}"
    return f"{time_us * 1e-6:.3g} s"


def _table(entry: dict[str, Any]) -> Table:
    shape = entry["shape"]
    sizes = " ".join(f"{name}={size}" for name, size in shape["sizes"].items())
    how = f"{entry['dtype']} {entry['mode']} on {entry['device']}"
    title = f"{entry['op']}, {shape['name']}: {sizes} {how}"
    peers = [peer for peer, result in entry["variants"].items() if "version" in result]
    at = HEADERS.index("x eager") + 1
    headers = (*HEADERS[:at], *(f"x {peer}" for peer in peers), *HEADERS[at:])
    table = Table(*headers, title=title, right=headers[1:-1])
    for name, result in entry["variants"].items():
        table.add(*_cells(name, result, peers))
    return table


def _footnotes(entry: dict[str, Any]) -> list[str]:
    """What each other library computed, which may be less than the op."""
    return [
        f"{name} {result['version']}: {result['computes']}"
        for name, result in entry["variants"].items()
        if "computes" in result
    ]


def _stem(args: argparse.Namespace, device: torch.device) -> str:
    return f"{'sweep' if args.sweep else 'bench'}_{device.type}"


def _write_plots(records: Sequence[dict[str, Any]], folder: Path, sweep: bool) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots", file=sys.stderr)
        return
    from kdkernels.cli import _plots

    for path in _plots.draw(records, folder, sweep=sweep):
        print(f"wrote {path}", file=sys.stderr)
