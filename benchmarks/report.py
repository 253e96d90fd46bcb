# SPDX-License-Identifier: Apache-2.0
"""Renders the results that README.md shows from the committed records, and compares them with the
targets.

python benchmarks/report.py                     print the block
python benchmarks/report.py --write README.md   put it between the markers
python benchmarks/report.py --check README.md   exit 1 if the file shows anything else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TARGETS = HERE / "targets.json"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
QUANTITIES = {
    "times_mm": "time over one mm",
    "speedup_over_eager": "speed-up over eager",
    "peak_extra_mib": "peak extra memory, MiB",
    "time_ms": "time, ms",
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def load(folder: Path = RESULTS) -> list[tuple[str, dict[str, Any]]]:
    """Every committed record with the name of its file."""
    return [
        (path.name, entry)
        for path in sorted(folder.glob("*.json"))
        for entry in json.loads(path.read_text()).get("records", [])
    ]


def render(records: Sequence[tuple[str, dict[str, Any]]], targets: Sequence[dict[str, Any]]) -> str:
    """The block between the markers, as Markdown."""
    lines = [*_results(records), "", *_targets(records, targets)]
    return "\n".join(lines)


def _results(records: Sequence[tuple[str, dict[str, Any]]]) -> Iterable[str]:
    lines: list[str] = []
    for device, title in DEVICES.items():
        found = [
            (file, entry)
            for file, entry in records
            if entry["device"] == device and "sweep" not in file
        ]
        if not found:
            lines += [f"**{title}**: not measured.", ""]
            continue
        for context, group in _by_context(found).items():
            lines += [f"**{title}**: {context}", ""]
            lines += [
                "| op | shape | dtype | mode | backend "
                "| time, ms | x eager | x mm | gradient error | MiB above inputs |",
                "|---|---|---|---|---|---:|---:|---:|---:|---:|",
            ]
            for entry in group:
                lines += _rows(entry)
            lines.append("")
    return lines[:-1]


def _by_context(records: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Records by where and when they were measured; times from different places are never in one
    table."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for file, entry in records:
        facts = entry["environment"]
        where = (
            facts.get("gpu")
            or f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"
        )
        commit = f"{entry['commit']}{' with changes' if entry['dirty'] else ''}"
        context = (
            f"{where}; torch {facts['torch']}; commit {commit}; {entry['date']}; "
            f"`benchmarks/results/{file}`"
        )
        groups.setdefault(context, []).append(entry)
    return groups


def _rows(entry: dict[str, Any]) -> Iterable[str]:
    sizes = "x".join(str(size) for size in entry["shape"]["sizes"].values())
    for name, result in entry["variants"].items():
        if name.startswith("mm"):
            continue
        start = f"| `{entry['op']}` | {sizes} | {entry['dtype']} | {entry['mode']} | {name} |"
        if "skipped" in result:
            yield f"{start} {result['skipped']} | | | | |"
            continue
        _, gradient = result["error"].values()
        cells = [
            f"{result['time_us']['p50'] * 1e-3:.3g}",
            _number(result, "speedup_over_eager", ".2f"),
            _number(result, "times_mm", ".2f"),
            gradient if isinstance(gradient, str) else f"{gradient:.1e}",
            _number(result, "peak_extra_mib", ".1f"),
        ]
        yield f"{start} {' | '.join(cells)} |"


def _number(result: dict[str, Any], key: str, form: str) -> str:
    return format(result[key], form) if key in result else "-"


def _measured(
    records: Sequence[tuple[str, dict[str, Any]]], target: dict[str, Any]
) -> float | None:
    """The latest measurement of what a target is about."""
    keys = ("op", "dtype", "mode", "device")
    found = [
        entry
        for _, entry in records
        if all(entry[key] == target[key] for key in keys)
        and entry["shape"]["name"] == target["shape"]
    ]
    for entry in sorted(found, key=lambda entry: entry["date"], reverse=True):
        result = entry["variants"].get(target["backend"], {})
        if target["quantity"] == "time_ms" and "time_us" in result:
            return result["time_us"]["p50"] * 1e-3
        if target["quantity"] in result:
            return result[target["quantity"]]
    return None


def _targets(
    records: Sequence[tuple[str, dict[str, Any]]], targets: Sequence[dict[str, Any]]
) -> Iterable[str]:
    yield "| target | backend | wanted | measured | |"
    yield "|---|---|---|---:|---|"
    for target in targets:
        bound = (
            f"at most {target['at_most']}"
            if "at_most" in target
            else f"at least {target['at_least']}"
        )
        value = _measured(records, target)
        if value is None:
            shown, verdict = "-", "not measured"
        else:
            met = value <= target["at_most"] if "at_most" in target else value >= target["at_least"]
            shown, verdict = f"{value:.3g}", "met" if met else "missed"
        what = f"`{target['op']}` {target['shape']} {target['dtype']} {target['mode']}"
        what = f"{what}: {QUANTITIES[target['quantity']]}"
        yield f"| {what} | {target['backend']} | {bound} | {shown} | {verdict} |"


def block() -> str:
    """What stands between the markers now."""
    return render(load(), json.loads(TARGETS.read_text())["targets"])


def replaced(text: str, new: str) -> str:
    """`text` with `new` between its markers.

    Raises:
        ValueError: the markers are missing or out of order.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"text must hold {BEGIN} and then {END}")
    return f"{text[: begin + len(BEGIN)]}\n{new}\n{text[end:]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--check", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.write is not None:
        args.write.write_text(replaced(args.write.read_text(), block()))
    elif args.check is not None:
        text = args.check.read_text()
        if replaced(text, block()) != text:
            print(
                f"{args.check} does not show benchmarks/results: "
                "run `python benchmarks/report.py --write` on it"
            )
            return 1
    else:
        print(block())
    return 0


if __name__ == "__main__":
    sys.exit(main())
