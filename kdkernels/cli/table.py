# SPDX-License-Identifier: Apache-2.0
"""Plain-text tables and JSON output, with nothing but the standard library."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from kdkernels.cli import UsageError

_COLOURS = {"red": "31", "green": "32", "yellow": "33"}
_NARROWEST_LAST = 24
_UNBOUNDED = 10_000  # columns, for a pipe or a file: cells stay on one line


class Table:
    """Columns under a header; the last one wraps to the terminal."""

    def __init__(self, *columns: str, title: str = "", right: Sequence[str] = ()) -> None:
        self._columns = columns
        self._title = title
        self._right = {columns.index(name) for name in right}
        self._rows: list[tuple[tuple[str, ...], str]] = []

    def add(self, *cells: object, colour: str = "") -> None:
        """Add a row; `colour` ("red", "green", "yellow") shows on a terminal only."""
        if len(cells) != len(self._columns):
            raise ValueError(
                f"cells must have {len(self._columns)} entries like the header, got {len(cells)}"
            )
        self._rows.append((tuple(str(cell) for cell in cells), colour))

    def __len__(self) -> int:
        return len(self._rows)

    def render(self, width: int = _UNBOUNDED, colours: bool = False) -> str:
        """The table as text, no wider than `width` if its columns before the last one allow."""
        every = [self._columns, *(cells for cells, _ in self._rows)]
        widths = [max(len(cells[i]) for cells in every) for i in range(len(self._columns))]
        room = width - sum(widths[:-1]) - 2 * (len(widths) - 1)
        widths[-1] = min(widths[-1], max(room, _NARROWEST_LAST))
        lines = [self._title] if self._title else []
        lines += self._format(self._columns, widths)
        lines.append("  ".join("-" * column for column in widths))
        for cells, colour in self._rows:
            text = self._format(cells, widths)
            lines += (
                [f"\x1b[{_COLOURS[colour]}m{line}\x1b[0m" for line in text]
                if colours and colour
                else text
            )
        return "\n".join(lines)

    def _format(self, cells: Sequence[str], widths: Sequence[int]) -> list[str]:
        first, *rest = textwrap.wrap(cells[-1], widths[-1]) or [""]
        padded = []
        for i, (cell, column) in enumerate(zip((*cells[:-1], first), widths, strict=True)):
            padded.append(cell.rjust(column) if i in self._right else cell.ljust(column))
        indent = " " * (sum(widths[:-1]) + 2 * (len(widths) - 1))
        return ["  ".join(padded).rstrip(), *(indent + line for line in rest)]

    def print(self, file: TextIO | None = None) -> None:
        """Print to `file` (default: standard output), fitted to it, with an empty line after."""
        file = sys.stdout if file is None else file
        terminal = file.isatty()
        width = shutil.get_terminal_size().columns if terminal else _UNBOUNDED
        print(
            self.render(width, colours=terminal and "NO_COLOR" not in os.environ),
            end="\n\n",
            file=file,
        )


def report_stream(json_path: str | None) -> TextIO:
    """Where text for a person goes: standard error while standard output carries the JSON."""
    return sys.stderr if json_path == "-" else sys.stdout


def write_json(record: dict[str, Any], json_path: str) -> None:
    """Write a record to a file, or to standard output for "-"; what is not finite as null."""
    text = json.dumps(finite(record), indent=2, allow_nan=False) + "\n"
    if json_path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(json_path).write_text(text)
    except OSError as error:
        raise UsageError(
            f"--json must name a file that can be written, got {json_path}: {error.strerror}"
        ) from error


def finite(value: Any) -> Any:
    """The value with None for each float in it that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
