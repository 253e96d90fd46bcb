# SPDX-License-Identifier: Apache-2.0
"""What is special about contrastive: which pairs count, and how they are averaged."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import Case, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import (
    each_backend,
    gradient_of,
    normal,
    on,
    with_references,
)
from torch import Tensor
from values import assert_same

ONLY = (("contrastive_loss", {}),)


def literal(pairs: list[tuple[Tensor, Tensor, bool]], margin: float) -> list[Tensor]:
    losses = []
    for first, second, same in pairs:
        d = (first - second).norm()
        losses.append(0.5 * d**2 if same else 0.5 * (margin - d).clamp_min(0) ** 2)
    return losses


@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@each_backend(losses=ONLY)
@settings(deadline=None, max_examples=12, database=None, derandomize=True)
@given(
    B=st.integers(0, 12),
    D=st.integers(2, 9),
    classes=st.integers(1, 5),
    margin=st.sampled_from([0.0, 0.8, 1.5]),
    reduction=st.sampled_from(["sum", "mean", "mean_nonzero"]),
)
def test_any_shape_is_the_definition(
    case: Case, bank: bool, B: int, D: int, classes: int, margin: float, reduction: str
) -> None:
    x, y = normal(case, B, D, classes, seed=3)
    r, r_y = normal(case, 7, D, classes, seed=4)
    options = with_references(r, r_y) if bank else {}
    loss, gradient = gradient_of(case, x, y, margin=margin, reduction=reduction, **options)
    leaf = x.requires_grad_()
    u, v = F.normalize(leaf, dim=1), F.normalize(r, dim=1)
    if bank:
        every = itertools.product(range(B), range(7))
        pairs = [(u[i], v[j], bool(y[i] == r_y[j])) for i, j in every]
    else:
        every = itertools.combinations(range(B), 2)
        pairs = [(u[i], u[j], bool(y[i] == y[j])) for i, j in every]
    losses = literal(pairs, margin)
    wanted = torch.stack(losses).sum() if losses else 0 * leaf.sum()
    count = {
        "sum": 1,
        "mean": len(losses),
        "mean_nonzero": sum(value.item() > 0 for value in losses),
    }[reduction]
    wanted = wanted / max(count, 1)
    assert_same(loss, wanted.detach(), least=1.0)
    (wanted_gradient,) = torch.autograd.grad(wanted, leaf)
    assert_same(gradient, wanted_gradient, least=1.0)


@each_backend(losses=ONLY)
def test_pytorch_metric_learning_with_its_distance_squared(case: Case) -> None:
    """Their loss is d for a positive pair and max(margin - d, 0) for a negative one, averaged apart
    over ordered pairs; squared and halved by hand it is this one."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    criterion = losses.ContrastiveLoss(neg_margin=1.5, reducer=reducers.DoNothingReducer())
    x, y = normal(case, 53, 12, 9)
    x = x.requires_grad_()
    found = criterion(x, y)
    expected = sum(found[kind]["losses"].square().sum() / 4 for kind in ("pos_loss", "neg_loss"))
    loss = case.call(x, y, margin=1.5, reduction="sum")
    assert_same(loss, expected)
    (gradient,), (wanted,) = (torch.autograd.grad(value, x) for value in (loss, expected))
    assert_same(gradient, wanted)


@each_backend((torch.float32, torch.float64), losses=ONLY)
def test_coincident_rows_cost_nothing_or_the_whole_margin(case: Case) -> None:
    x = torch.ones(6, 5, dtype=case.dtype, device=case.device)
    y = torch.tensor([0, 0, 0, 1, 1, 2], device=case.device)
    for normalize in (False, True):
        for reduction, count in (("sum", 1), ("mean", 15), ("mean_nonzero", 11)):
            loss, gradient = gradient_of(
                case, x, y, margin=2.0, reduction=reduction, normalize_embeddings=normalize
            )
            torch.testing.assert_close(loss.item(), 11 * 2.0 / count)
            assert gradient.eq(0).all()


@each_backend((torch.float32, torch.float64), losses=ONLY)
def test_a_collapsed_batch_keeps_its_digits(case: Case) -> None:
    x, y = normal(case, 120, 16, 20)
    x = 5 + 1e4 * torch.finfo(case.dtype).eps * x
    rows = on(case, "collapsed", x, y, normalize_embeddings=False)
    assert_within_budget(rows, rows.errors())
