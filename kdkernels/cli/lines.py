# SPDX-License-Identifier: Apache-2.0
"""Options and output of commands that may be stopped before they end: one JSON object per line,
written out at once, and a limit of time. A command that has lost its device goes on with the rest
in a new process."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from kdkernels.cli import UsageError
from kdkernels.cli.table import finite
from kdkernels.testing.limit import Limit


class Lines:
    """Context manager around a file of JSON lines; None writes nothing. What was written is in the
    file even if the process is killed right after."""

    def __init__(self, path: str | None, resume: bool = False) -> None:
        if resume and path is None:
            raise UsageError("--resume needs --lines, which names the file to go on with")
        self._path = path
        self._file: TextIO | None = None
        self.before: list[dict[str, Any]] = []  # results in the file that is gone on with
        if resume and Path(path).exists():
            *whole, _ = Path(path).read_text(encoding="utf-8").split("\n")  # the last may be cut
            lines = map(json.loads, whole)
            self.before = [line for line in lines if not {"ended", "not_reached"} & set(line)]

    def __enter__(self) -> Lines:
        if self._path is not None:
            try:
                self._file = open(self._path, "w", encoding="utf-8")
            except OSError as error:
                raise UsageError(
                    f"--lines must name a file that can be written, got {self._path}: "
                    f"{error.strerror}"
                ) from error
            for record in self.before:
                self.write(record)
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
        "--resume", action="store_true",
        help="go on with what the file of --lines lacks; a run whose GPU takes no more work after "
        "a failure does so by itself, in a new process",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive(float), metavar="SECONDS",
        help=f"begin no new {what} after so long; the output says what was not reached",
    )  # fmt: skip


def start_anew(words: Sequence[str], limit: Limit) -> NoReturn:
    """Become a process that goes on with the lines of this one, given its command line."""
    left = limit.left()
    rest = [] if left is None else ["--limit", str(max(left, 1e-3))]
    sys.stdout.flush()
    sys.stderr.flush()
    os.closerange(3, 4096)  # the driver's files, which hold the memory of the lost device
    command = [sys.executable, "-m", "kdkernels", *words, "--resume", *rest]
    os.execv(sys.executable, command)


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The argparse type of a number above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse
