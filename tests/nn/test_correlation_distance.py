# SPDX-License-Identifier: Apache-2.0
"""CorrelationDistanceLoss: its presets, by ranks counted with plain loops, and soft ranks."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from modules import maps
from torch import Tensor

import kdkernels as kd
from kdkernels.reference import _correlation as correlation_reference

DISTANCE = kd.nn.CorrelationDistanceLoss


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows, from the squared differences of ranks: rows without ties."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        n = len(x)
        squares = sum(
            (sum(u < v for u in x) - sum(u < w for u in y)) ** 2 for v, w in zip(x, y, strict=True)
        )
        total += 1 - 6 * squares.double() / (n * (n * n - 1))
    return total / len(a)


def test_r2kd_prints_ranks_that_train_nothing() -> None:
    student, teacher = maps(6, 5).requires_grad_(), maps(6, 5)
    value = 2 * correlation_reference.correlation(student, teacher, temperature=4.0, centered=False)
    loss = DISTANCE()(student, teacher)
    # 1e-8 beside the product of norms, which of the ranks 1 to 5 is 10
    expected = value + 2 * (1 - spearman(student, teacher) * 10 / (10 + 1e-8))
    torch.testing.assert_close(loss, expected)
    gradient, expected = (torch.autograd.grad(x, student)[0] for x in (loss, value))
    torch.testing.assert_close(gradient, expected)
    without = DISTANCE(rank="none")(student, teacher)
    torch.testing.assert_close(without, value)


def test_soft_ranks_train() -> None:
    pytest.importorskip("torchsort")
    student, teacher = maps(6, 5).requires_grad_(), maps(6, 5)
    only_ranks = DISTANCE("cmkd", value_weight=0.0)
    only_ranks(student, teacher).backward()
    assert student.grad.isfinite().all()
    assert student.grad.ne(0).any()
    sharp = DISTANCE("cmkd", value_weight=0.0, regularization_strength=1e-6)(student, teacher)
    torch.testing.assert_close(sharp, 1 - spearman(student, teacher))


def test_soft_ranks_are_those_of_torchsort(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the optional library: what it is given, and where its ranks enter."""
    seen = []

    def soft_rank(x: Tensor, regularization_strength: float) -> Tensor:
        seen.append((x.dtype, regularization_strength))
        return x * x

    stand_in = ModuleType("torchsort")
    stand_in.soft_rank = soft_rank
    monkeypatch.setitem(sys.modules, "torchsort", stand_in)
    student, teacher = maps(6, 5).bfloat16(), maps(6, 5).bfloat16()
    loss = DISTANCE("cmkd", rank_weight=0.5, temperature=2.0, regularization_strength=0.3)
    found = loss(student, teacher)
    ranks = [(x.float() / 2) ** 2 for x in (student, teacher)]
    rows = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]
    )
    value = kd.correlation(student, teacher, temperature=2.0)
    torch.testing.assert_close(found, value + 0.5 * (1 - rows).mean())
    assert seen == [(torch.float32, 0.3)] * 2
    assert "regularization_strength=0.3" in repr(loss)


def test_soft_ranks_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsort", None)
    with pytest.raises(ImportError, match="pip install --no-build-isolation torchsort"):
        DISTANCE("cmkd")
    DISTANCE("cmkd", rank="hard")
