# SPDX-License-Identifier: Apache-2.0
"""The modules on probabilities and correlations: PKT, DIST, correlation distances, comparisons."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from test_nn import maps
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.reference import correlation as correlation_reference
from kdkernels.reference import pkt as pkt_reference

PKT, DIST, DISTANCE, COMPARATIVE = (
    kd.nn.PKTLoss, kd.nn.DISTLoss, kd.nn.CorrelationDistanceLoss, kd.nn.ComparativeLoss,
)  # fmt: skip


def test_pkt_of_repdistiller() -> None:
    student, teacher = maps(6, 3, 4), maps(6, 20)
    expected = 30000 * pkt_reference.pkt(student.flatten(1), teacher)
    torch.testing.assert_close(PKT()(student, teacher), expected)
    torch.testing.assert_close(PKT(2)([student] * 2, [teacher] * 2), expected / 7500)


def test_pkt_of_information_flow_adds_both_kernels() -> None:
    student, teacher = maps(6, 4), maps(6, 20)
    expected = sum(
        pkt_reference.pkt(student, teacher, kernel=kernel, divergence="jeffreys")
        for kernel in ("cosine", "student_t")
    )
    torch.testing.assert_close(PKT(preset="information_flow")(student, teacher), expected)


@pytest.mark.parametrize(("preset", "temperature"), [("imagenet", 1.0), ("cifar", 4.0)])
def test_dist_presets(preset: str, temperature: float) -> None:
    student, teacher = maps(6, 5), maps(6, 5)
    expected = 2 * correlation_reference.correlation(student, teacher, temperature=temperature)
    torch.testing.assert_close(DIST(preset=preset)(student, teacher), expected)
    one_sided = DIST(1.0, beta=0.0, gamma=3.0, temperature=2.5)(student, teacher)
    expected = correlation_reference.correlation(
        student, teacher, temperature=2.5, row_weight=0.0, column_weight=3.0
    )
    torch.testing.assert_close(one_sided, expected)


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


def test_comparisons_of_all_pairs() -> None:
    student, teacher = maps(7, 3, 2).requires_grad_(), maps(7, 3, 2)
    d = (student - teacher).flatten(1)
    expected = 3 * (d[:, None] - d).square().mean()
    loss = COMPARATIVE(3)(student, teacher)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted)
    shifted = COMPARATIVE()(teacher + 1000, teacher)
    torch.testing.assert_close(shifted, torch.zeros_like(shifted))
    assert COMPARATIVE()(maps(0, 4), maps(0, 4)).item() == 0


MODULES: dict[str, Any] = {
    "pkt": PKT, "flow": lambda: PKT(preset="information_flow"), "dist": DIST, "r2kd": DISTANCE,
    "comparative": COMPARATIVE,
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_each_module_in_torch(name: str) -> None:
    """No state, one graph, fp32 for half precision, no gradient of the teacher, NaN kept."""
    module: nn.Module = MODULES[name]()
    assert not module.state_dict()
    student, teacher = maps(6, 5).requires_grad_(), maps(6, 5).requires_grad_()
    loss = module(student, teacher)
    loss.backward()
    assert teacher.grad is None
    gradient, student.grad = student.grad, None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(student, teacher)
    compiled.backward()
    torch.testing.assert_close((compiled, student.grad), (loss, gradient))
    half = student.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(half, teacher.detach().float())
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad.isfinite().all()
    broken = student.detach().clone()
    broken[1, 1] = torch.nan
    assert module(broken, teacher).isnan()


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (PKT, {"preset": "paper"}, ValueError, "preset must be one of 'repdistiller', 'infor"),
        (PKT, {"weight": -1}, ValueError, "weight must be a finite number"),
        (PKT, {"backend": "gpu"}, ValueError, "backend must be one of"),
        (DIST, {"preset": "coco"}, ValueError, "preset must be one of 'imagenet', 'cifar'"),
        (DIST, {"beta": -1.0}, ValueError, "beta must be a finite number"),
        (DIST, {"temperature": 0.0}, ValueError, "temperature must be a positive finite"),
        (DISTANCE, {"preset": "dist"}, ValueError, "preset must be one of 'r2kd', 'cmkd'"),
        (DISTANCE, {"rank": "exact"}, ValueError, "rank must be one of 'none', 'hard', 'soft'"),
        (DISTANCE, {"rank_weight": "1"}, TypeError, "rank_weight must be a number, got str"),
        (DISTANCE, {"regularization_strength": 0}, ValueError, "regularization_strength must"),
        (COMPARATIVE, {"weight": None}, TypeError, "weight must be a number, got NoneType"),
    ],
)
def test_options_that_do_not_fit(
    make: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="teacher must have 5 outputs per sample like student"):
        COMPARATIVE()(maps(6, 5), maps(6, 4))
    with pytest.raises(ValueError, match="teacher must have 5 columns like student, got 4"):
        DIST()(maps(6, 5), maps(6, 4))


def test_repr_names_the_meaning() -> None:
    assert repr(PKT()) == "PKTLoss(weight=30000, preset='repdistiller', backend='auto')"
    assert repr(DIST(preset="cifar")) == (
        "DISTLoss(weight=2, preset='cifar', beta=1, gamma=1, temperature=4, backend='auto')"
    )
    assert "temperature=4, rank='hard', backend" in repr(DISTANCE())
    assert repr(COMPARATIVE()) == "ComparativeLoss(weight=1)"
