# SPDX-License-Identifier: Apache-2.0
"""A record of `kdkernels bench` as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdkernels.cli.table import Table

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
    "launches",
    "note",
)


def _cells(name: str, result: dict[str, Any], peers: Sequence[str]) -> list[str]:
    def number(key: str, form: str) -> str:
        return format(result[key], form) if key in result else "-"

    spread = result.get("time_us", {})
    if "device_us" in result:
        spread = {"p50": result["device_us"]}
    times = [_duration(spread[key]) if key in spread else "-" for key in ("p50", "p20", "p80")]
    found = result.get("error", {})
    gradient = next((e for what, e in found.items() if what != "loss"), "-")
    errors = [e if isinstance(e, str) else f"{e:.1e}" for e in (found.get("loss", "-"), gradient)]
    ratios = (
        number("speedup_over_eager", ".2f"),
        *(
            format(result["speedup_over"][peer], ".2f") if "speedup_over" in result else "-"
            for peer in peers
        ),
        number("times_mm", ".2f"),
        number("percent_of_limit", ".0f"),
    )
    notes = ("failed", "skipped", "error_failed", "peak_extra_mib_skipped", "launches_unknown")
    note = next((result[key] for key in notes if key in result), "")
    counts = number("peak_extra_mib", ".1f"), number("launches", ".4g")
    return [name, *times, *ratios, *errors, *counts, note]


def _duration(time_us: float) -> str:
    for limit, factor, unit in ((1e3, 1.0, "us"), (1e6, 1e-3, "ms")):
        if time_us < limit:
            return f"{time_us * factor:.3g} {unit}"
    return f"{time_us * 1e-6:.3g} s"


def table(entry: dict[str, Any]) -> Table:
    shape = entry["shape"]
    sizes = " ".join(f"{name}={size}" for name, size in shape["sizes"].items())
    how = f"{entry['dtype']} {entry['mode']} by {entry['timing']} on {entry['device']}"
    title = f"{entry['op']}, {shape['name']}: {sizes} {how}"
    peers = [peer for peer, result in entry["variants"].items() if "version" in result]
    at = HEADERS.index("x eager") + 1
    headers = (*HEADERS[:at], *(f"x {peer}" for peer in peers), *HEADERS[at:])
    table = Table(*headers, title=title, right=headers[1:-1])
    for name, result in entry["variants"].items():
        table.add(*_cells(name, result, peers))
    return table


def footnotes(entry: dict[str, Any]) -> list[str]:
    """What errors were measured against, where that is less than all; and what each other library
    computed, which may be less than the op."""
    oracle = entry["oracle"]
    partial = [f"errors: {oracle}"] if oracle is not None and oracle != "definition in fp64" else []
    return partial + [
        f"{name} {result['version']}: {result['computes']}"
        for name, result in entry["variants"].items()
        if "computes" in result
    ]
