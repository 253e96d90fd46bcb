# SPDX-License-Identifier: Apache-2.0
"""Draws the record of a demo run: accuracy and agreement of hash bits against epoch, and time and
memory of each loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_GREY = "0.35"
# tab20, full colours first, then their light ones: more entries than tab10 has colours
_PALETTE = matplotlib.color_sequences["tab20"][::2] + matplotlib.color_sequences["tab20"][1::2]


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the figure of a record as PNG."""
    students = record["students"]
    colours = _colours(students)
    costed = [student for student in students if student["step_time"] is not None]
    hashed = [student for student in students if student["curve_agreement"] is not None]
    height = 9 if hashed else 7 if costed else 5
    figure = Figure(figsize=(14, height), dpi=120, layout="constrained")
    settings = record["settings"]
    figure.suptitle(
        f"Distilling on {settings['data']}: batch {settings['batch_size']}, "
        f"{settings['epochs']} epochs, teacher {record['teacher']['parameters']:,} and "
        f"student {record['student_parameters']:,} parameters, {record['device']}",
        fontsize=13,
    )
    if costed:
        grid = figure.add_gridspec(6, 2, width_ratios=(3, 2))
        last = 4 if hashed else 6
        _accuracy(figure.add_subplot(grid[:last, 0]), record, colours)
        if hashed:
            _agreement(figure.add_subplot(grid[last:, 0]), hashed, colours)
        times = {student["label"]: student["step_time"]["median_ms"] for student in costed}
        memory = {student["label"]: student["peak_bytes"] / 2**20 for student in costed}
        bar_colours = [colours[student["name"]] for student in costed]
        _bars(
            figure.add_subplot(grid[:3, 1]),
            times,
            bar_colours,
            "Time of the loss, forward and backward",
            "ms per step",
        )
        _bars(
            figure.add_subplot(grid[3:, 1]),
            memory,
            bar_colours,
            "Peak memory of the loss above its inputs",
            "MiB",
        )
    else:
        _accuracy(figure.add_subplot(), record, colours)
    figure.savefig(path)


def _colours(students: list[dict[str, Any]]) -> dict[str, Any]:
    return {student["name"]: _PALETTE[i % len(_PALETTE)] for i, student in enumerate(students)}


def _accuracy(axes: Axes, record: dict[str, Any], colours: dict[str, Any]) -> None:
    final = record["teacher"]["accuracy"]
    axes.axhline(
        100 * final, color=_GREY, linestyle=":", linewidth=1.5, label=f"teacher ({final:.1%})"
    )
    twins = {student["twin"] for student in record["students"]}
    for student in record["students"]:
        epochs = range(1, len(student["curve_accuracy"]) + 1)
        values = [100 * value for value in student["curve_accuracy"]]
        # an entry that repeats another is dashed over it, and the other is broad, so that both show
        dashed, broad = student["twin"] is not None, student["name"] in twins
        axes.plot(
            epochs,
            values,
            label=f"{student['label']} ({student['accuracy']:.1%})",
            color=colours[student["name"]],
            linestyle=(0, (4, 3)) if dashed else "-",
            linewidth=4 if broad else 1.8,
            alpha=0.55 if broad else 1.0,
            marker="o" if len(values) == 1 else None,
            zorder=4 if dashed else 3,
        )
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title="Accuracy of the student")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.95)


def _agreement(axes: Axes, hashed: list[dict[str, Any]], colours: dict[str, Any]) -> None:
    axes.axhline(50, color=_GREY, linestyle=":", linewidth=1.5, label="chance (50%)")
    for student in hashed:
        values = [100 * value for value in student["curve_agreement"]]
        axes.plot(
            range(1, len(values) + 1),
            values,
            label=f"{student['label']} ({values[-1]:.1f}%)",
            color=colours[student["name"]],
            linewidth=1.8,
            marker="o" if len(values) == 1 else None,
        )
    axes.set(
        xlabel="epoch",
        ylabel="equal bits (%)",
        title="Hash bits that student and teacher have in common on the test set",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.95)


def _bars(axes: Axes, values: dict[str, float], colours: list[Any], title: str, unit: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, labels=[_three_digits(value) for value in values.values()], padding=4)
    axes.invert_yaxis()  # the first entry on top, as in the table
    axes.set(title=title, xlabel=unit)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
