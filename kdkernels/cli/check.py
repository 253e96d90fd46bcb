# SPDX-License-Identifier: Apache-2.0
"""Check the loss and gradients of every op, backend, dtype and sample against fp64.

A result may be twice as wrong as the definition itself is in the same dtype, plus one rounding
error. "of budget" is the worst error as a share of what is allowed; up to 100% passes. "relative"
is the worst error as a share of the result's size. Exit status 1 if anything fails.

On a machine without CUDA the Triton kernels run in Triton's interpreter, which is slow and stands
in for the GPU.

examples:
  kdkernels check
  kdkernels check --quick                        every fifth sample
  kdkernels check --backend cpu --dtype bfloat16 float16
  kdkernels check --op gram_mse --verbose        one row per sample
  kdkernels check --device cpu --json check.json"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels._progress import Progress
from kdkernels.cli import UsageError
from kdkernels.cli.table import Table, report_stream, write_json
from kdkernels.testing import numerics
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos

NAME = "check"
HELP = "every op, backend and dtype against the definition in fp64"

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
QUICK_STRIDE = 5  # --quick takes every fifth sample


@dataclass(frozen=True)
class Outcome:
    """One sample on one backend."""

    op: str
    backend: str
    dtype: str
    sample: str
    ok: bool
    worst: str  # the tensor with the largest share of its budget: "loss", "dstudent", ...
    share: float  # error / budget of that tensor
    relative: float  # the largest error of any tensor, relative to its scale
    error: float
    budget: float
    message: str  # what failed, for a person


@dataclass(frozen=True)
class Skipped:
    """A backend that cannot run some samples, and why."""

    op: str
    backend: str
    dtype: str
    samples: int
    reason: str


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
    parser.add_argument("--quick", action="store_true", help="every fifth sample only")
    parser.add_argument("--verbose", action="store_true", help="one row per sample")
    parser.add_argument(
        "--json", metavar="FILE", help='write every sample as JSON too; "-" is standard output'
    )


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
    infos = [info for info in opinfos() if info.name in args.op]
    outcomes, skipped = _check_all(
        infos, args.backend or _dispatch.BACKENDS, args.dtype, device, args.quick
    )
    for backend in args.backend or ():
        if not any(outcome.backend == backend for outcome in outcomes):
            reasons = "; ".join(
                dict.fromkeys(skip.reason for skip in skipped if skip.backend == backend)
            )
            raise UsageError(f"--backend {backend} can run nothing of this on {device}: {reasons}")
    if not outcomes:
        raise UsageError(
            f"nothing of this can run on {device}: "
            + "; ".join(dict.fromkeys(skip.reason for skip in skipped))
        )
    (_sample_table(outcomes) if args.verbose else _summary_table(outcomes)).print(file)
    if skipped:
        _skipped_table(skipped).print(file)
    failed = [outcome for outcome in outcomes if not outcome.ok]
    for outcome in failed:
        key = f"{outcome.op} {outcome.backend} {outcome.dtype} {outcome.sample}"
        print(f"FAIL {key}: {outcome.message}", file=file)
    counts = f"{len(outcomes) - len(failed)} passed, {len(failed)} failed"
    print(f"{len(outcomes)} samples on {device}: {counts}", file=file)
    if args.json:
        write_json(_record(device, args.quick, outcomes, skipped), args.json)
    return 1 if failed else 0


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
    infos: Sequence[OpInfo],
    backends: Sequence[str],
    dtypes: Sequence[str],
    device: torch.device,
    quick: bool,
) -> tuple[list[Outcome], list[Skipped]]:
    outcomes: list[Outcome] = []
    refusals: Counter[tuple[str, str, str, str]] = Counter()
    work = [
        (info, backend, dtype, sample)
        for info in infos
        for backend in backends
        for dtype in dtypes
        if DTYPES[dtype] in info.dtypes
        for sample in list(info.samples(device, DTYPES[dtype]))[:: QUICK_STRIDE if quick else 1]
    ]
    with Progress(len(work), "check") as progress:
        for info, backend, dtype, sample in work:
            reason = _why_not(info, backend, sample)
            if reason is None:
                outcomes.append(_check(info, backend, dtype, sample))
            else:
                refusals[info.name, backend, dtype, reason] += 1
            progress.step(f"{info.name} {backend} {dtype} {sample.name}")
    skipped = [
        Skipped(op, backend, dtype, n, reason)
        for (op, backend, dtype, reason), n in refusals.items()
    ]
    return outcomes, skipped


def _why_not(info: OpInfo, backend: str, sample: Sample) -> str | None:
    found = _dispatch.implementation(info.op, backend)
    if isinstance(found, str):
        return found
    try:
        kd.explain(info.public, *sample.args, backend=backend, **sample.kwargs)
    except kd.BackendUnavailableError as error:
        return str(error)
    return None


def _check(info: OpInfo, backend: str, dtype: str, sample: Sample) -> Outcome:
    key = info.name, backend, dtype, sample.name
    try:
        errors = numerics.check_sample(info, sample, DTYPES[dtype], backend)
    except Exception as error:  # a crash is a finding like any other: reported, and the rest runs
        message = f"{type(error).__name__}: {error}"
        return Outcome(*key, False, "crash", math.inf, math.inf, math.inf, 0.0, message)
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


def _share(error: numerics.Error) -> float:
    if error.budget > 0:
        return error.error / error.budget
    return 0.0 if error.ok else math.inf


def _groups(outcomes: Sequence[Outcome]) -> Iterator[list[Outcome]]:
    """The samples of each op, backend and dtype."""
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.op, outcome.backend, outcome.dtype), []).append(outcome)
    yield from found.values()


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "inf"


def _verdict(ok: bool) -> tuple[str, str]:
    return ("PASS", "green") if ok else ("FAIL", "red")


def _summary_table(outcomes: Sequence[Outcome]) -> Table:
    columns = "op", "backend", "dtype", "samples", "of budget", "relative", "", "worst sample"
    table = Table(*columns, right=("samples", "of budget", "relative"))
    for group in _groups(outcomes):
        worst = max(group, key=lambda outcome: outcome.share)
        verdict, colour = _verdict(all(outcome.ok for outcome in group))
        relative = max(outcome.relative for outcome in group)
        place = f"{worst.sample}, {worst.worst}"
        cells = (
            worst.op,
            worst.backend,
            worst.dtype,
            len(group),
            _percent(worst.share),
            f"{relative:.1e}",
            verdict,
            place,
        )
        table.add(*cells, colour=colour)
    return table


def _sample_table(outcomes: Sequence[Outcome]) -> Table:
    columns = (
        "op",
        "backend",
        "dtype",
        "sample",
        "tensor",
        "error",
        "budget",
        "of budget",
        "relative",
        "",
    )
    table = Table(*columns, right=("error", "budget", "of budget", "relative"))
    for outcome in outcomes:
        verdict, colour = _verdict(outcome.ok)
        numbers = (
            f"{outcome.error:.1e}",
            f"{outcome.budget:.1e}",
            _percent(outcome.share),
            f"{outcome.relative:.1e}",
        )
        key = outcome.op, outcome.backend, outcome.dtype, outcome.sample, outcome.worst
        table.add(*key, *numbers, verdict, colour=colour)
    return table


def _skipped_table(skipped: Sequence[Skipped]) -> Table:
    """Dtypes that share a reason in one row."""
    table = Table("op", "backend", "dtype", "samples", "not run, because", right=("samples",))
    merged: dict[tuple[str, str, str], list[Skipped]] = {}
    for skip in skipped:
        merged.setdefault((skip.op, skip.backend, skip.reason), []).append(skip)
    for (op, backend, reason), group in merged.items():
        table.add(
            op,
            backend,
            ", ".join(skip.dtype for skip in group),
            sum(skip.samples for skip in group),
            reason,
        )
    return table


def _record(
    device: torch.device, quick: bool, outcomes: Sequence[Outcome], skipped: Sequence[Skipped]
) -> dict[str, object]:
    return {
        "kdkernels": kd.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": str(device),
        "quick": quick,
        "passed": sum(outcome.ok for outcome in outcomes),
        "failed": sum(not outcome.ok for outcome in outcomes),
        "samples": [asdict(outcome) for outcome in outcomes],
        "not_run": [asdict(skip) for skip in skipped],
    }
