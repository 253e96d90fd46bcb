# SPDX-License-Identifier: Apache-2.0
"""What is special about triplet_all: which triplets count, pytorch-metric-learning's results, long
lists of positives, and TensorFlow Addons' choice of negatives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, assert_within_budget, interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import (
    each_backend,
    gradient_of,
    normal,
    on,
    whole,
    with_references,
)
from torch import Tensor
from values import assert_same

from kdkernels import _dispatch

ALL, PAIRS = {"mining": "batch_all"}, {"mining": "pair_semihard"}


def each_of(
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    backends: Any = _dispatch.BACKENDS,
    minings: tuple[dict[str, str], ...] = (ALL,),
) -> pytest.MarkDecorator:
    return each_backend(dtypes, backends, tuple(("triplet_loss_all", mining) for mining in minings))


@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("soft", [False, True], ids=["hinge", "soft"])
@pytest.mark.parametrize("reduction", ["mean_nonzero", "mean"])
@each_of()
def test_loss_is_that_of_pytorch_metric_learning(
    case: Case, reduction: str, soft: bool, distance: str, bank: bool
) -> None:
    distances, losses, reducers = (
        pytest.importorskip(f"pytorch_metric_learning.{name}")
        for name in ("distances", "losses", "reducers")
    )
    measure = {
        "euclidean": distances.LpDistance,
        "sqeuclidean": lambda: distances.LpDistance(power=2),
        "cosine": distances.CosineSimilarity,
    }[distance]()
    reducer = {"mean_nonzero": reducers.AvgNonZeroReducer, "mean": reducers.MeanReducer}
    criterion = losses.TripletMarginLoss(
        margin=0.1, smooth_loss=soft, distance=measure, reducer=reducer[reduction]()
    )
    x, y = normal(case, 61, 12, 9)
    r, r_y = normal(case, 47, 12, 11, seed=2)
    x, r = x.requires_grad_(), r.requires_grad_()
    sources = (x, r) if bank else (x,)
    expected = criterion(x, y, None, r, r_y) if bank else criterion(x, y)
    loss = case.call(
        x, y, margin=0.1, soft=soft, distance=distance, reduction=reduction,
        **(with_references(r, r_y) if bank else {}),
    )  # fmt: skip
    assert_same(loss, expected)
    gradients = torch.autograd.grad(loss, sources)
    for out, wanted in zip(gradients, torch.autograd.grad(expected, sources), strict=True):
        assert_same(out, wanted)


def literal(x: Tensor, y: Tensor, margin: float, semihard: bool) -> tuple[Tensor, int, int]:
    """(sum of the losses, losses above 0, triplets), triplet by triplet."""
    d = {(i, j): (x[i] - x[j]).norm() for i, j in itertools.permutations(range(len(x)), 2)}
    losses = []
    for a, p in d:
        negatives = [d[a, n] for n in range(len(x)) if y[n] != y[a]]
        if y[a] != y[p] or not negatives:
            continue
        if semihard:
            beyond = [value for value in negatives if value > d[a, p]]
            negatives = [min(beyond) if beyond else max(negatives)]
        losses += [(d[a, p] - value + margin).clamp_min(0) for value in negatives]
    total = torch.stack(losses).sum() if losses else 0 * x.sum()
    return total, sum(loss.item() > 0 for loss in losses), len(losses)


@each_of(minings=(ALL, PAIRS))
@settings(deadline=None, max_examples=12, database=None, derandomize=True)
@given(
    B=st.integers(0, 12),
    D=st.integers(2, 9),
    classes=st.integers(1, 5),
    margin=st.sampled_from([0.0, 0.2, 1.0]),
    reduction=st.sampled_from(["sum", "mean", "mean_nonzero"]),
)
def test_any_shape_is_the_definition(
    case: Case, B: int, D: int, classes: int, margin: float, reduction: str
) -> None:
    x, y = normal(case, B, D, classes, seed=3)
    loss, gradient = gradient_of(case, x, y, margin=margin, reduction=reduction)
    leaf = x.requires_grad_()
    wanted, nonzero, valid = literal(
        F.normalize(leaf, dim=1), y, margin, case.sample.kwargs == PAIRS
    )
    wanted = wanted / max({"sum": 1, "mean": valid, "mean_nonzero": nonzero}[reduction], 1)
    assert_same(loss, wanted.detach(), least=1.0)
    (wanted_gradient,) = torch.autograd.grad(wanted, leaf)
    assert_same(gradient, wanted_gradient, least=1.0)


def _many(case: Case, bank: bool, soft: bool, classes: int) -> Case:
    """From one positive per anchor to hundreds, with classes of unequal size."""
    slow = interpreted(case.backend, case.device) or case.backend == "reference"
    B, M = (60, 50) if slow else (300, 270)
    x, y = normal(case, B, 12, classes * classes)
    options = {"soft": soft, "margin": 0.3}
    if bank:
        r, r_y = normal(case, M, 12, classes * classes, seed=2)
        options |= with_references(r, r_y.float().sqrt().long())
    return on(case, "many", x, y.float().sqrt().long(), **options)


@pytest.mark.parametrize("classes", [1, 2, 5, 40])
@pytest.mark.parametrize("soft", [False, True], ids=["hinge", "soft"])
@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@each_of((torch.float64,), minings=(ALL, PAIRS))
def test_few_and_many_positives(case: Case, bank: bool, soft: bool, classes: int) -> None:
    many = _many(case, bank, soft, classes)
    assert_within_budget(many, many.errors())


@pytest.mark.parametrize("classes", [1, 2, 5, 40])
@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@each_of((torch.float32,), minings=(ALL,))
def test_few_and_many_positives_in_fp32(case: Case, bank: bool, classes: int) -> None:
    """The loss that rounding does not bend."""
    many = _many(case, bank, True, classes)
    assert_within_budget(many, many.errors())


@each_of((torch.float16, torch.float32), minings=(PAIRS,))
def test_ties_go_to_the_lowest_row(case: Case) -> None:
    """Raw whole numbers, whose squared distances are exact; the gradient tells which row was
    taken."""
    x, y = whole(case, 50, 4, 4)
    options = {"normalize_embeddings": False, "distance": "sqeuclidean", "reduction": "sum"}
    _, found = gradient_of(case, x, y, margin=0.25, **options)
    _, expected = gradient_of(case.on("reference"), x, y, margin=0.25, **options)
    assert torch.equal(found, expected)


@each_of((torch.float32, torch.float64), minings=(ALL, PAIRS))
def test_equal_rows(case: Case) -> None:
    _, y = normal(case, 24, 5, 3)
    x = torch.ones(24, 5, dtype=case.dtype, device=case.device)
    for normalize in (False, True):
        loss, gradient = gradient_of(case, x, y, margin=0.25, normalize_embeddings=normalize)
        assert loss.item() == 0.25
        assert gradient.eq(0).all()


@each_of((torch.float32, torch.float64), minings=(ALL, PAIRS))
def test_a_collapsed_batch_keeps_its_digits(case: Case) -> None:
    x, y = normal(case, 120, 16, 20)
    x = 5 + 1e4 * torch.finfo(case.dtype).eps * x
    rows = on(case, "collapsed", x, y, normalize_embeddings=False, margin=0.0)
    assert_within_budget(rows, rows.errors())
