# SPDX-License-Identifier: Apache-2.0
"""What `kdkernels check` found, as tables and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdkernels.cli.table import Table


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
    """Samples that did not run on a backend, and why."""

    op: str
    backend: str
    dtype: str
    samples: int
    reason: str


@dataclass
class Findings:
    """What a run found."""

    outcomes: list[Outcome]
    refused: list[Skipped]  # by a backend that cannot run them
    not_reached: list[Skipped]  # within the limit of time


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


def summary_table(outcomes: Sequence[Outcome]) -> Table:
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


def sample_table(outcomes: Sequence[Outcome]) -> Table:
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


def skipped_table(skipped: Sequence[Skipped], why: str) -> Table:
    """Dtypes that share a reason in one row."""
    table = Table("op", "backend", "dtype", "samples", why, right=("samples",))
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


def counts(found: Findings) -> dict[str, int]:
    return {
        "passed": sum(outcome.ok for outcome in found.outcomes),
        "failed": sum(not outcome.ok for outcome in found.outcomes),
        "not_reached": sum(skip.samples for skip in found.not_reached),
    }


def record(found: Findings) -> dict[str, Any]:
    return {
        **counts(found),
        "samples": [asdict(outcome) for outcome in found.outcomes],
        "not_run": [asdict(skip) for skip in found.refused],
        "not_reached_groups": [asdict(skip) for skip in found.not_reached],
    }
