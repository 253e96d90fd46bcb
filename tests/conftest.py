# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: seeded by its own id, on poisoned memory, only on hardware that is
there."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import cuda_host
import interpreter
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    interpreter.use()

cuda_host.use()  # before cases are enumerated; processes of xdist inherit it

NOT_RUN = pytest.StashKey[Counter]()
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """The seed is the test's id, so adding a test changes no other."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    # torch.manual_seed would keep a stack trace per test for each kind of accelerator not here
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(seed)


def _poisoning(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        result = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or not _called_from_package(sys._getframe(1)):
            return result
        if result.is_floating_point():
            return result.fill_(torch.nan)
        return result if result.dtype == torch.bool else result.fill_(torch.iinfo(result.dtype).max)

    return poisoned


def _called_from_package(frame: Any) -> bool:
    return frame.f_globals.get("__name__", "").startswith("kdkernels.")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that the package allocates holds NaN, so reading what was never written shows."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))
    return


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what this machine cannot run: absent backends, and tests that need a GPU."""
    absent: Counter[str] = Counter()
    kept, dropped = [], []
    reasons: dict[tuple[Any, ...], str | None] = {}
    for item in items:
        reason = _why_not(item, reasons)
        (kept if reason is None else dropped).append(item)
        if reason is not None:
            absent[reason] += 1
    config.stash[NOT_RUN] = absent
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _why_not(item: pytest.Item, known: dict[tuple[Any, ...], str | None]) -> str | None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        return "no GPU here"
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec is not None else None
    if case is None:
        return None
    key = (case.info.name, case.backend, case.device, case.dtype, case.sample.name)
    if key not in known:
        reason = case.why_not()
        known[key] = None if reason is None else f"{case.info.name} on {case.backend}: {reason}"
    return known[key]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    absent = config.stash.get(NOT_RUN, Counter())
    if absent:
        parts = [f"{count} ({reason})" for reason, count in sorted(absent.items())]
        terminalreporter.write_line(f"not run on this machine: {'; '.join(parts)}")
