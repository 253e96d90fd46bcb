# SPDX-License-Identifier: Apache-2.0
"""Plots of benchmark records: over the batch size for a sweep, bars by shape otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

QUANTITIES = (
    (
        "time",
        "time of forward and backward, ms",
        lambda r: r.get("time_us", {}).get("p50", 0) * 1e-3,
    ),
    ("memory", "peak memory above the inputs, MiB", lambda r: r.get("peak_extra_mib", 0)),
)
COLORS = {
    "cpu": "C0",
    "triton": "C0",
    "cuda": "C1",
    "reference": "C2",
    "eager": "C3",
    "compile": "C4",
    "mm": "0.5",
}
PEER_COLORS = ("C5", "C6", "C8", "C9")


def draw(records: Sequence[dict[str, Any]], folder: Path, *, sweep: bool) -> Iterator[Path]:
    """Write one PNG for each op, dtype, mode and quantity, and name it."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in records:
        groups.setdefault((entry["op"], entry["dtype"], entry["mode"]), []).append(entry)
    for (op, dtype, mode), entries in groups.items():
        for quantity, label, value in QUANTITIES:
            if not any(
                value(result) > 0 for entry in entries for result in entry["variants"].values()
            ):
                continue  # memory was not asked for
            figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
            (_lines if sweep else _bars)(axes, entries, value)
            facts = entries[0]["environment"]
            where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
            width = f", D = {entries[0]['shape']['sizes'].get('D')}" if sweep else ""
            axes.set_title(f"{op}, {dtype}, {mode}{width}\n{where}", fontsize=10)
            axes.set_ylabel(
                label if mode == "fwd_bwd" else label.replace("forward and backward", mode)
            )
            axes.set_yscale("log")
            axes.grid(which="major", alpha=0.3)
            axes.legend()
            path = folder / f"{'sweep' if sweep else 'bench'}_{op}_{dtype}_{mode}_{quantity}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            yield path


def _colors(entries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The colour of each variant to draw; whatever brings a version is another library."""
    variants = [variant for entry in entries for variant in entry["variants"].items()]
    present = {name for name, _ in variants}
    peers = sorted({name for name, result in variants if "version" in result})
    found = {name: color for name, color in COLORS.items() if name in present}
    return found | {peer: PEER_COLORS[i % len(PEER_COLORS)] for i, peer in enumerate(peers)}


def _lines(axes: Any, entries: Sequence[dict[str, Any]], value: Any) -> None:
    for name, color in _colors(entries).items():
        points = [
            (entry["shape"]["sizes"]["B"], value(entry["variants"].get(name, {})))
            for entry in entries
        ]
        points = [(B, y) for B, y in points if y > 0]
        if points:
            style = "--" if name == "mm" else "-"
            axes.plot(
                *zip(*points, strict=True),
                style,
                marker="o",
                markersize=3,
                color=color,
                label=name,
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch size B")


def _bars(axes: Any, entries: Sequence[dict[str, Any]], value: Any) -> None:
    colors = _colors(entries)
    names = [n for n in colors if any(value(entry["variants"].get(n, {})) > 0 for entry in entries)]
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        heights = [value(entry["variants"].get(name, {})) for entry in entries]
        places = [x + i * width for x, height in enumerate(heights) if height > 0]
        axes.bar(
            places,
            [height for height in heights if height > 0],
            width,
            color=colors[name],
            label=name,
        )
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(entries))])
    labels = [
        f"{entry['shape']['name']}\n"
        + "x".join(str(size) for size in entry["shape"]["sizes"].values())
        for entry in entries
    ]
    axes.set_xticklabels(labels, fontsize=7)
