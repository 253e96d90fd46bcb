# SPDX-License-Identifier: Apache-2.0
"""Calls in processes of their own."""

from __future__ import annotations

import os

import pytest

from kdkernels.testing import fresh


def test_a_call_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_TEST", "seen")
    seen = {fresh.call("os", "getpid"), fresh.call("os", "getpid"), os.getpid()}
    assert len(seen) == 3
    assert fresh.call("os", "getenv", "KDKERNELS_TEST") == "seen"


def test_a_failure_is_told_with_its_cause() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)math\.sqrt failed: .*math domain error"):
        fresh.call("math", "sqrt", -1.0)
    with pytest.raises(RuntimeError, match=r"os\._exit failed: .* exit status 3"):
        fresh.call("os", "_exit", 3)
