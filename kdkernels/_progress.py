# SPDX-License-Identifier: Apache-2.0
"""Progress of long work on standard error: a rich bar where rich is installed, one rewritten line
where it is not.

Where standard error is no terminal there is no bar, and only what `Progress.note` says is printed.
"""

from __future__ import annotations

import importlib.util
import sys
from types import TracebackType
from typing import Any


class Progress:
    """Context manager that counts to `total`."""

    def __init__(self, total: int, label: str) -> None:
        self._total = total
        self._done = 0
        self._label = label
        self._shown = 0  # length of the plain line on the terminal
        self._terminal = sys.stderr.isatty()
        self._rich: Any = None
        if self._terminal and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            self._rich = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._rich.add_task(label, total=total)

    def __enter__(self) -> Progress:
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        self._clear()

    def step(self, label: str, count: int = 1) -> None:
        """Count `count` further units and say what is being done."""
        self._done += count
        self._label = label
        if self._rich is not None:
            self._rich.update(self._task, advance=count, description=label)
        elif self._terminal:
            self._clear()
            line = f"[{self._done}/{self._total}] {label}"
            sys.stderr.write(line)
            sys.stderr.flush()
            self._shown = len(line)

    def note(self, text: str) -> None:
        """Print a line that stays, terminal or not."""
        if self._rich is not None:
            self._rich.console.print(text, markup=False, highlight=False)
        else:
            self._clear()
            print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r" + " " * self._shown + "\r")
            self._shown = 0
