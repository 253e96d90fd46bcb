# SPDX-License-Identifier: Apache-2.0
"""Renders the committed records and compares them with the targets: the kernels in README.md, and
all that they were measured beside in benchmarks/results/README.md.

python benchmarks/report.py           print both
python benchmarks/report.py --write   put each between the markers of its file
python benchmarks/report.py --check   exit 1 if a file shows anything else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TARGETS = HERE / "targets.json"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
QUANTITIES = {
    "times_mm": "time over mm",
    "speedup_over_eager": "speed-up over eager",
    "speedup_over": "speed-up over",  # the target names the peer
    "peak_extra_mib": "peak extra memory, MiB",
    "time_ms": "time, ms",
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
KERNELS = ("cpu", "triton", "cuda")
MOST_TEXT = 160  # of a reason


def load(folder: Path = RESULTS) -> list[tuple[str, dict[str, Any]]]:
    """Every committed record with the name of its file."""
    return [
        (path.name, entry)
        for path in sorted(folder.glob("*.json"))
        for entry in json.loads(path.read_text()).get("records", [])
    ]


def render(records: Sequence[tuple[str, dict[str, Any]]], targets: Sequence[dict[str, Any]]) -> str:
    """Every measurement and every target, as Markdown."""
    lines = [*_results(records, _rows), "", *_targets(records, targets)]
    return "\n".join(lines)


def summary(records: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The measurements of the kernels, as Markdown."""
    return "\n".join(_results(records, _kernel_rows))


def _results(
    records: Sequence[tuple[str, dict[str, Any]]],
    rows: Callable[[dict[str, Any]], Iterable[str]],
) -> Iterable[str]:
    lines: list[str] = []
    for device, title in DEVICES.items():
        found = [
            (file, entry)
            for file, entry in records
            if entry["device"] == device and "sweep" not in file and _of_calls(entry)
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
                lines += rows(entry)
            lines += ["", *(_footnotes(group) if rows is _rows else [])]
    return lines[:-1]


def _of_calls(entry: dict[str, Any]) -> bool:
    """Whether a record has times of calls, and not of single kernels."""
    return entry.get("timing") != "kernels"


def _footnotes(entries: Iterable[dict[str, Any]]) -> list[str]:
    """What each other library computed, which may be less than the op; with an empty line after."""
    lines = {
        f"- `{entry['op']}`, {name} {result['version']}: {result['computes']}": None
        for entry in entries
        for name, result in entry["variants"].items()
        if "computes" in result
    }
    return [*lines, ""] if lines else []


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


def _kernel_rows(entry: dict[str, Any]) -> Iterable[str]:
    variants = {name: entry["variants"][name] for name in KERNELS if name in entry["variants"]}
    return _rows({**entry, "variants": variants})


def _rows(entry: dict[str, Any]) -> Iterable[str]:
    sizes = "x".join(str(size) for size in entry["shape"]["sizes"].values())
    what = f"`{entry['op']}` | {entry['shape']['name']} {sizes} | {entry['dtype']}"
    for name, result in entry["variants"].items():
        if name.startswith("mm"):
            continue
        called = f"{name} {result['version']}" if "version" in result else name
        how = ", by graph" if entry.get("timing") == "graph" else ""
        start = f"| {what} | {entry['mode']}{how} | {called} |"
        missing = result.get("failed") or result.get("skipped")
        if missing is not None:
            yield f"{start} {_in_a_cell(missing)} | | | | |"
            continue
        *_, gradient = result.get("error", {"gradient": "-"}).values()
        cells = [
            f"{result['time_us']['p50'] * 1e-3:.3g}",
            _number(result, "speedup_over_eager", ".2f"),
            _number(result, "times_mm", ".2f"),
            gradient if isinstance(gradient, str) else f"{gradient:.1e}",
            _number(result, "peak_extra_mib", ".1f"),
        ]
        yield f"{start} {' | '.join(cells)} |"


def _in_a_cell(text: str) -> str:
    """A reason may be what a compiler wrote."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} ..."


def _number(result: dict[str, Any], key: str, form: str) -> str:
    return format(result[key], form) if key in result else "-"


def _measured(
    records: Sequence[tuple[str, dict[str, Any]]], target: dict[str, Any]
) -> float | None:
    """The latest measurement of what a target is about, of graphs before that of calls."""
    keys = ("op", "dtype", "mode", "device")
    found = [
        entry
        for _, entry in records
        if all(entry[key] == target[key] for key in keys)
        and entry["shape"]["name"] == target["shape"]
        and _of_calls(entry)
    ]

    def rank(entry: dict[str, Any]) -> tuple[str, bool]:
        return entry["date"], entry.get("timing") == "graph"

    for entry in sorted(found, key=rank, reverse=True):
        result = entry["variants"].get(target["backend"], {})
        if target["quantity"] == "time_ms" and "time_us" in result:
            return result["time_us"]["p50"] * 1e-3
        if target["quantity"] in result:
            value = result[target["quantity"]]
            return value.get(target["peer"]) if "peer" in target else value
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
        quantity = QUANTITIES[target["quantity"]]
        quantity = f"{quantity} {target['peer']}" if "peer" in target else quantity
        what = f"{what}: {quantity}"
        yield f"| {what} | {target['backend']} | {bound} | {shown} | {verdict} |"


def blocks() -> dict[Path, str]:
    """What has to stand between the markers of each file."""
    records = load()
    targets = json.loads(TARGETS.read_text())["targets"]
    return {
        HERE.parent / "README.md": summary(records),
        RESULTS / "README.md": render(records, targets),
    }


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
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    stale = []
    for path, block in blocks().items():
        new = replaced(path.read_text(), block)
        if args.write:
            path.write_text(new)
        elif not args.check:
            print(block, end="\n\n")
        elif new != path.read_text():
            stale.append(path.relative_to(HERE.parent))
    for name in stale:
        print(f"{name} does not show the records: run `python benchmarks/report.py --write`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
