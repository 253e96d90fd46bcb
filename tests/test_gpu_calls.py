# SPDX-License-Identifier: Apache-2.0
"""What calls ask of a GPU, seen without one; `gpu_calls.py` runs them in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from kdkernels.testing import no_interpreter


@pytest.fixture(scope="session")
def seen() -> dict[str, Any]:
    return json.loads(no_interpreter.printed(Path(__file__).with_name("gpu_calls.py")))


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
