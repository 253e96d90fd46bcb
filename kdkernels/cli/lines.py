# SPDX-License-Identifier: Apache-2.0
"""Options and output of commands that may be stopped before they end: one JSON object per line,
written out at once, and a limit of time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from kdkernels.cli import UsageError
from kdkernels.cli.table import finite


class Lines:
    """Context manager around a file of JSON lines; None writes nothing. What was written is in the
    file even if the process is killed right after."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> Lines:
        if self._path is not None:
            try:
                self._file = open(self._path, "w", encoding="utf-8")
            except OSError as error:
                raise UsageError(
                    f"--lines must name a file that can be written, got {self._path}: "
                    f"{error.strerror}"
                ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record as one line; what is not finite becomes null."""
        if self._file is not None:
            self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            self._file.flush()


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """The options `--lines` and `--limit`; `what` becomes a line of the file."""
    parser.add_argument(
        "--lines", metavar="FILE",
        help=f"write one JSON object per line for each {what} as it ends, so that a run which is "
        "killed leaves what it has",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive(float), metavar="SECONDS",
        help=f"begin no new {what} after so long; the output says what was not reached",
    )  # fmt: skip


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The argparse type of a number above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse
