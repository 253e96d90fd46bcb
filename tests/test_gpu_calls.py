# SPDX-License-Identifier: Apache-2.0
"""What calls ask of a GPU, seen without one; `gpu_calls.py` runs them in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def seen() -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gpu_calls.py"))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_remembered_launches_are_of_the_kernels_that_triton_would_choose(
    seen: dict[str, Any],
) -> None:
    assert seen["remembered"] > 0
    assert seen["wrong"] == []


def test_no_call_reads_a_number_from_the_device_or_takes_a_tensor_from_the_host(
    seen: dict[str, Any],
) -> None:
    assert seen["calls"] > 0
    assert seen["reads"] == []
