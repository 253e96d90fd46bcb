# SPDX-License-Identifier: Apache-2.0
"""What is said where memory is not there: how many bytes were asked for, by which operator, for
what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, each_case, few, recorded

import kdkernels as kd
from kdkernels import _dispatch


def _raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Every launcher of every backend raises."""

    def launch(*args: Any) -> Any:
        raise error

    class Launchers(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return launch

    monkeypatch.setattr(_dispatch, "select", lambda *args: Launchers())


@each_case(pick=lambda found: few(found)[:1], backends=("cpu",), devices=(torch.device("cpu"),))
def test_a_result_that_does_not_fit_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator, args, results in recorded(case):
        results = results if isinstance(results, (tuple, list)) else (results,)
        for found, result in zip(operator._schema.returns, results, strict=True):
            same = [other for other in results if other.shape == result.shape]
            if len(same) > 1:  # which of them is not said
                continue
            size = result.numel() * result.element_size()
            shape = ", ".join(map(str, result.shape))
            _raising(monkeypatch, RuntimeError(f"cannot allocate {size} bytes, shape [{shape}]"))
            with pytest.raises(RuntimeError) as raised:
                operator(*args)
            expected = (
                f"{operator._schema.name} cannot allocate {size} bytes for its result {found.name} "
                f"of shape {list(result.shape)} and dtype {result.dtype} on cpu"
            )
            assert str(raised.value).startswith(expected)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("cannot allocate 1234567 bytes, shape [1234567]"), "1234567 bytes"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"), "2.50 GiB"),
        (MemoryError("std::bad_alloc"), "memory"),
    ],
    ids=["cpu", "cuda", "bad_alloc"],
)
def test_working_memory_that_does_not_fit(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _raising(monkeypatch, error)
    expected = f"kdkernels::pairwise_fwd cannot allocate {said} for its working memory on cpu: "
    with pytest.raises(RuntimeError) as raised:
        kd.pairwise(torch.ones(3, 2))
    assert str(raised.value) == expected + str(error)
    assert raised.value.__cause__ is error


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("a kernel is wrong")
    _raising(monkeypatch, error)
    with pytest.raises(RuntimeError) as raised:
        kd.pairwise(torch.ones(3, 2))
    assert raised.value is error


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_matrix_of_16_terabytes(backend: str) -> None:
    if _dispatch.why_not("pairwise", backend, (torch.ones(1, 1), None, "dot", 1.0)) is not None:
        pytest.skip(f"no {backend} here")
    x = torch.ones(2_000_000, 1)
    with pytest.raises(RuntimeError) as raised:
        kd.pairwise(x, metric="dot", backend=backend)
    assert str(raised.value).startswith(
        "kdkernels::pairwise_fwd cannot allocate 16000000000000 bytes for its result out of shape "
        "[2000000, 2000000] and dtype torch.float32 on cpu: "
    )
