# SPDX-License-Identifier: Apache-2.0
"""Check the loss and gradients of every op, backend, dtype and sample against fp64.

A result may be twice as wrong as the definition itself is in the same dtype, plus one rounding
error. "of budget" is the worst error as a share of what is allowed; up to 100% passes. "relative"
is the worst error as a share of the result's size. Exit status 1 if anything fails; a sample that
raises, even from a compiler, fails with the reason, and the others run.

On a machine without CUDA the Triton kernels run in Triton's interpreter, which is slow and stands
in for the GPU.

examples:
  kdkernels check
  kdkernels check --quick                        every fifth sample
  kdkernels check --backend cpu --dtype bfloat16 float16
  kdkernels check --op gram_mse --verbose        one row per sample
  kdkernels check --op pkt --sample 'one_*'      the samples whose names match
  kdkernels check --device cpu --json check.json
  kdkernels check --lines check.jsonl --limit 80 for a machine that is lent for minutes
  kdkernels check --shard 3/16                   the third of sixteen equal parts"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from typing import Any

import torch

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels._progress import Progress
from kdkernels.cli import UsageError, lines
from kdkernels.cli import _check_report as report
from kdkernels.cli._check_report import Findings, Outcome, Skipped
from kdkernels.cli.lines import Lines
from kdkernels.cli.table import report_stream, write_json
from kdkernels.testing import clock, numerics
from kdkernels.testing.limit import Limit
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos

NAME = "check"
HELP = "every op, backend and dtype against the definition in fp64"

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
CRASH = "crash"  # in the place of the worst tensor
QUICK_STRIDE = 5  # --quick takes every fifth sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [info.name for info in opinfos()]
    parser.add_argument(
        "--op", nargs="+", choices=names, default=names, metavar="OP", help=f"of {', '.join(names)}"
    )
    backends = ", ".join(_dispatch.BACKENDS)
    parser.add_argument(
        "--backend", nargs="+", choices=_dispatch.BACKENDS, metavar="BACKEND",
        help=f"of {backends}; one that cannot run here is then an error (default: all that can)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES), help="default: all"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--sample", nargs="+", metavar="PATTERN",
        help="samples by name, * and ? as in a shell; see --verbose for names (default: all)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="every fifth sample only")
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N",
        help="only the I-th of N parts, from 1: every N-th sample",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="one row per sample")
    parser.add_argument(
        "--json", metavar="FILE",
        help='write all as one JSON object when it has ended; "-" is standard output',
    )  # fmt: skip
    lines.add_arguments(parser, "sample")


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text}")
    return int(part), int(parts)


def run(args: argparse.Namespace) -> int:
    device = parse_device(args.device)
    file = report_stream(args.json)
    if device.type == "cpu" and "triton" in (args.backend or _dispatch.BACKENDS):
        # Triton reads it when it is imported, which the first Triton kernel does
        os.environ["TRITON_INTERPRET"] = "1"
        print(
            "Triton kernels run in Triton's interpreter here, which stands in for a GPU.\n",
            file=file,
        )
    limit = Limit(args.limit)
    about = {"command": NAME, **_versions(device), "quick": args.quick}
    with Lines(args.lines, args.resume) as file_of_lines:
        if not file_of_lines.before:
            file_of_lines.write(about)
        found = _check_all(args, device, limit, file_of_lines)
        file_of_lines.write({"ended": True, **report.counts(found)})
    if not found.not_reached and args.shard == (1, 1):  # a part may be empty
        _refuse_nothing(args, device, found)
    outcomes = found.outcomes
    (report.sample_table(outcomes) if args.verbose else report.summary_table(outcomes)).print(file)
    for skipped, why in (
        (found.refused, "not run, because"), (found.not_reached, "not reached, because"),
    ):  # fmt: skip
        if skipped:
            report.skipped_table(skipped, why).print(file)
    for outcome in (outcome for outcome in outcomes if not outcome.ok):
        key = f"{outcome.op} {outcome.backend} {outcome.dtype} {outcome.sample}"
        print(f"FAIL {key}: {outcome.message}", file=file)
    counts = report.counts(found)
    text = f"{counts['passed']} passed, {counts['failed']} failed"
    if counts["not_reached"]:
        text += f", {counts['not_reached']} not reached"
    print(f"{len(outcomes)} samples on {device}: {text}", file=file)
    if args.json:
        write_json({**about, **report.record(found)}, args.json)
    return 1 if counts["failed"] else 0


def _refuse_nothing(args: argparse.Namespace, device: torch.device, found: Findings) -> None:
    """A check that ran nothing is wrong usage."""

    def reasons(backend: str | None = None) -> str:
        return "; ".join(
            dict.fromkeys(skip.reason for skip in found.refused if backend in (None, skip.backend))
        )

    for backend in args.backend or ():
        if reasons(backend) and not any(o.backend == backend for o in found.outcomes):
            raise UsageError(
                f"--backend {backend} can run nothing of this on {device}: {reasons(backend)}"
            )
    if not found.outcomes and found.refused:
        raise UsageError(f"nothing of this can run on {device}: {reasons()}")
    if not found.outcomes:
        raise UsageError("--sample and --quick leave no sample of these ops and dtypes")


def parse_device(name: str | None) -> torch.device:
    """The device that the user named, or the best one; `UsageError` if there is none such."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _check_all(
    args: argparse.Namespace, device: torch.device, limit: Limit, out: Lines
) -> Findings:
    outcomes: list[Outcome] = []
    refusals: Counter[tuple[str, str, str, str]] = Counter()
    late: Counter[tuple[str, str, str, str]] = Counter()
    groups = [
        (info, dtype)
        for info in opinfos()
        if info.name in args.op
        for dtype in args.dtype
        if DTYPES[dtype] in info.dtypes
    ]
    number = itertools.count()
    done = {_key(line): line for line in out.before if "sample" in line}
    with Progress(len(groups), "check") as progress:
        for info, dtype in groups:
            try:
                samples = _samples(info, device, dtype, args, number)
            except Exception as error:  # of a device that an earlier sample broke
                outcomes.append(_crash((info.name, "none", dtype, "all"), error))
                out.write(asdict(outcomes[-1]))
                continue
            for backend, sample in itertools.product(args.backend or _dispatch.BACKENDS, samples):
                progress.step(f"{info.name} {backend} {dtype} {sample.name}", count=0)
                known = done.get((info.name, backend, dtype, sample.name))
                if known is not None and "ok" in known:
                    outcomes.append(_outcome(known))
                    continue
                if known is not None:
                    refusals[info.name, backend, dtype, known["not_run"]] += 1
                    continue
                over = limit.over()
                if over is not None:
                    late[info.name, backend, dtype, over] += 1
                    continue
                begin = time.perf_counter()
                result = _check(info, backend, dtype, sample)
                seconds = round(time.perf_counter() - begin, 4)
                if isinstance(result, Outcome):
                    outcomes.append(result)
                    out.write({**asdict(result), "seconds": seconds})
                    if result.worst == CRASH and args.lines and clock.lost(device) is not None:
                        lines.start_anew(args.words, limit)
                else:
                    refusals[info.name, backend, dtype, result] += 1
                    key = {"op": info.name, "backend": backend, "dtype": dtype}
                    out.write({**key, "sample": sample.name, "not_run": result})
            progress.step(f"{info.name} {dtype}")
    found = Findings(outcomes, _skips(refusals), _skips(late))
    for skip in found.not_reached:
        key = {"op": skip.op, "backend": skip.backend, "dtype": skip.dtype}
        out.write({**key, "samples": skip.samples, "not_reached": skip.reason})
    return found


def _samples(
    info: OpInfo,
    device: torch.device,
    dtype: str,
    args: argparse.Namespace,
    number: Iterator[int],  # of the samples of all groups, from 0
) -> list[Sample]:
    part, parts = args.shard
    samples = list(info.samples(device, DTYPES[dtype]))[:: QUICK_STRIDE if args.quick else 1]
    patterns = args.sample or ["*"]
    named = [s for s in samples if any(fnmatchcase(s.name, pattern) for pattern in patterns)]
    return [sample for sample in named if next(number) % parts == part - 1]


def _key(line: dict[str, Any]) -> tuple[str, str, str, str]:
    return line["op"], line["backend"], line["dtype"], line["sample"]


def _outcome(line: dict[str, Any]) -> Outcome:
    """What was written as a line, where null is infinite."""
    values = {field.name: line[field.name] for field in fields(Outcome)}
    return Outcome(**{name: math.inf if v is None else v for name, v in values.items()})


def _skips(counts: Counter[tuple[str, str, str, str]]) -> list[Skipped]:
    return [
        Skipped(op, backend, dtype, n, reason) for (op, backend, dtype, reason), n in counts.items()
    ]


def _why_not(info: OpInfo, backend: str, sample: Sample) -> str | None:
    found = _dispatch.implementation(info.op, backend)
    if isinstance(found, str):
        return found
    try:
        kd.explain(info.public, *sample.args, backend=backend, **sample.kwargs)
    except kd.BackendUnavailableError as error:
        return str(error)
    return None


def _check(info: OpInfo, backend: str, dtype: str, sample: Sample) -> Outcome | str:
    """What a sample gives on a backend, or why the backend cannot run it."""
    key = info.name, backend, dtype, sample.name
    try:
        reason = _why_not(info, backend, sample)
        if reason is not None:
            return reason
        errors = numerics.check_sample(info, sample, DTYPES[dtype], backend)
    except Exception as error:  # a crash is a finding like any other: reported, and the rest runs
        return _crash(key, error)
    worst = max(errors, key=_share)
    message = "; ".join(error.detail for error in errors if not error.ok)
    return Outcome(
        *key,
        ok=not message,
        worst=worst.what,
        share=_share(worst),
        relative=max(error.relative for error in errors),
        error=worst.error,
        budget=worst.budget,
        message=message,
    )


def _crash(key: tuple[str, str, str, str], error: Exception) -> Outcome:
    message = f"{type(error).__name__}: {error}"
    return Outcome(*key, False, CRASH, math.inf, math.inf, math.inf, 0.0, message)


def _share(error: numerics.Error) -> float:
    if error.budget > 0:
        return error.error / error.budget
    return 0.0 if error.ok else math.inf


def _versions(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "kdkernels": kd.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": str(device),
        "device_name": name,
    }
