# SPDX-License-Identifier: Apache-2.0
"""Running the console script in a test."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kdkernels.cli.main import main


def exit_code(*argv: str) -> int | str | None:
    with pytest.raises(SystemExit) as raised:
        main(argv)
    return raised.value.code


def output_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The JSON that a command writes to standard output, which must hold nothing else."""
    assert main([*argv, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)
