# SPDX-License-Identifier: Apache-2.0
"""What is special about triplet: which rows are mined, pytorch-metric-learning's results, ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import (
    each_backend,
    gradient_of,
    normal,
    whole,
    with_references,
)
from torch import Tensor
from values import assert_same

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels.ops.triplet import STRATEGIES
from kdkernels.testing import numerics

# Of pytorch-metric-learning on STUDENT, computed by independent code; given to 12 decimals.
PUBLISHED_LOSS, PUBLISHED_NORM = 0.419965366611, 0.424403088646
PUBLISHED_POSITIVES, PUBLISHED_NEGATIVES = [1, 6, 3, 2, 5, 4, 1], [7, 7, 1, 4, 3, 6, 7]
# Of positives and negatives.
COMBINATIONS = [(p, n) for p in STRATEGIES for n in STRATEGIES if not p == n == "semihard"]
HARD, SEMIHARD = {"mining": "batch_hard"}, {"mining": "batch_semihard"}


def each_of(
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    backends: Any = _dispatch.BACKENDS,
    minings: tuple[dict[str, str], ...] = (HARD,),
) -> pytest.MarkDecorator:
    return each_backend(dtypes, backends, tuple(("triplet_loss", mining) for mining in minings))


every_float = each_of((torch.float32, torch.float64))


def assert_same_triplets(found: kd.MinedTriplets, expected: kd.MinedTriplets) -> None:
    for name in ("anchors", "positives", "negatives"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("d_ap", "d_an"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@each_of()
def test_published_values(case: Case) -> None:
    x, y = case.sample.args
    mined = kd.mine_triplets(x.clone().requires_grad_(), y, backend=case.backend)
    assert not any(tensor.requires_grad for tensor in mined)
    assert mined.anchors.tolist() == list(range(7))
    assert mined.positives.tolist() == PUBLISHED_POSITIVES
    assert mined.negatives.tolist() == PUBLISHED_NEGATIVES
    loss, gradient = gradient_of(case, x, y, margin=0.2)
    assert abs(loss.item() - PUBLISHED_LOSS) <= numerics.FP64_RELATIVE
    assert abs(gradient.norm().item() - PUBLISHED_NORM) <= numerics.FP64_RELATIVE


@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize(("positives", "negatives"), COMBINATIONS)
@each_of()
def test_mines_what_pytorch_metric_learning_mines(
    case: Case, positives: str, negatives: str, bank: bool
) -> None:
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    names = {"hardest": "hard", "semihard": "semihard", "easiest": "easy"}
    miner = miners.BatchEasyHardMiner(names[positives], names[negatives])
    x, y = normal(case, 83, 12, 9)
    r, r_y = normal(case, 57, 12, 11, seed=2)
    anchors, p, _, n = miner(x, y, r, r_y) if bank else miner(x, y)
    found = kd.mine_triplets(
        x, y, positives=positives, negatives=negatives, backend=case.backend,
        **(with_references(r, r_y) if bank else {}),
    )  # fmt: skip
    assert torch.equal(found.anchors, anchors)
    assert torch.equal(found.positives, p)
    assert torch.equal(found.negatives, n)
    if positives == negatives == "hardest":
        alias = miners.BatchHardMiner()(x, y, r, r_y) if bank else miners.BatchHardMiner()(x, y)
        assert all(torch.equal(a, b) for a, b in zip(alias, found[:3], strict=True))


@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("soft", [False, True], ids=["hinge", "soft"])
@each_of(minings=(HARD, SEMIHARD))
def test_loss_is_that_of_pytorch_metric_learning(
    case: Case, soft: bool, distance: str, bank: bool
) -> None:
    distances, losses, miners = (
        pytest.importorskip(f"pytorch_metric_learning.{name}")
        for name in ("distances", "losses", "miners")
    )
    measure = {
        "euclidean": distances.LpDistance,
        "sqeuclidean": lambda: distances.LpDistance(power=2),
        "cosine": distances.CosineSimilarity,
    }[distance]()
    negatives = "hard" if case.sample.kwargs == HARD else "semihard"
    miner = miners.BatchEasyHardMiner("hard", negatives, distance=measure)
    criterion = losses.TripletMarginLoss(margin=0.1, smooth_loss=soft, distance=measure)
    x, y = normal(case, 83, 12, 9)
    r, r_y = normal(case, 57, 12, 11, seed=2)
    x, r = x.requires_grad_(), r.requires_grad_()
    sources = (x, r) if bank else (x,)
    extra = (r, r_y) if bank else ()
    expected = criterion(x, y, miner(x, y, *extra), *extra)
    options = with_references(r, r_y) if bank else {}
    loss = case.call(x, y, margin=0.1, soft=soft, distance=distance, **options)
    assert_same(loss, expected)
    gradients = torch.autograd.grad(loss, sources)
    for out, wanted in zip(gradients, torch.autograd.grad(expected, sources), strict=True):
        assert_same(out, wanted)


@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize(("positives", "negatives"), COMBINATIONS)
@each_of((torch.float16, torch.float32, torch.float64))
def test_every_strategy_breaks_ties_like_the_reference(
    case: Case, positives: str, negatives: str, bank: bool
) -> None:
    x, y = whole(case, 67, 4, 5)
    options = {"positives": positives, "negatives": negatives, "normalize_embeddings": False}
    if bank:
        options |= with_references(*whole(case, 45, 4, 6, seed=2))
    found, expected = (
        kd.mine_triplets(x, y, **options, backend=backend)
        for backend in (case.backend, "reference")
    )
    assert len(expected.anchors)
    assert_same_triplets(found, expected)
    assert torch.equal(found.anchors, found.anchors.unique())


@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@every_float
def test_copies_of_a_row_lose_to_the_first(case: Case, bank: bool) -> None:
    """Rows that were normalised, so that ranking rounds: equal rows still round alike."""
    x, y = normal(case, 23, 37, 4)
    x, y = x.repeat(4, 1), y.repeat(4)
    options = with_references(x, y) if bank else {}
    mined = kd.mine_triplets(x, y, backend=case.backend, **options)
    assert len(mined.anchors) == len(x)
    assert mined.positives.max() < 23
    assert mined.negatives.max() < 23


@pytest.mark.parametrize("negatives", ["hardest", "semihard"])
@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@every_float
def test_many_tiles(case: Case, bank: bool, negatives: str) -> None:
    B, M = (80, 70) if interpreted(case.backend, case.device) else (700, 650)
    x, y = whole(case, B, 24, 60)
    options: dict[str, Any] = {"normalize_embeddings": False, "negatives": negatives}
    if bank:
        options |= with_references(*whole(case, M, 24, 70, seed=2))
    found, expected = (
        kd.mine_triplets(x, y, **options, backend=backend)
        for backend in (case.backend, "reference")
    )
    assert_same_triplets(found, expected)


@pytest.mark.parametrize("offset", [5.0, 1000.0])
@each_of((torch.float32, torch.float64), backends=("cpu", "reference"))
def test_a_collapsed_batch_is_ranked_all_the_same(case: Case, offset: float) -> None:
    """Rows that lie close together far from 0: |x|^2 + |y|^2 - 2 <x, y> alone would rank noise."""
    x, y = normal(case, 200, 16, 20)
    spread = 1e4 * torch.finfo(case.dtype).eps * offset
    x = offset + spread * x
    found = kd.mine_triplets(x, y, normalize_embeddings=False, backend=case.backend)
    exact = kd.mine_triplets(x.double(), y, normalize_embeddings=False, backend="reference")
    assert_same_triplets(
        found, kd.MinedTriplets(*exact[:3], *(d.to(case.dtype) for d in exact[3:]))
    )


@every_float
def test_equal_rows(case: Case) -> None:
    x, y = torch.ones_like(normal(case, 24, 5, 3)[0]), normal(case, 24, 5, 3)[1]
    for normalize in (False, True):
        loss, gradient = gradient_of(case, x, y, margin=0.25, normalize_embeddings=normalize)
        assert loss.item() == 0.25
        assert gradient.eq(0).all()


@every_float
def test_one_column(case: Case) -> None:
    x, y = whole(case, 50, 1, 4)
    options = {"normalize_embeddings": False}
    found, expected = (
        kd.mine_triplets(x, y, **options, backend=name) for name in (case.backend, "reference")
    )
    assert_same_triplets(found, expected)


@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize(("positives", "negatives"), COMBINATIONS)
@each_of((torch.float32,))
def test_rows_that_are_not_finite_are_chosen_first(
    case: Case, positives: str, negatives: str, bank: bool
) -> None:
    x, y = normal(case, 41, 6, 4)
    x[3, 1], x[17, 0], x[30] = torch.nan, torch.inf, torch.finfo(case.dtype).max ** 0.5
    options: dict[str, Any] = {"positives": positives, "negatives": negatives}
    options |= with_references(x.flip(0), y.flip(0)) if bank else {}
    found, expected = (
        kd.mine_triplets(x, y, normalize_embeddings=False, **options, backend=backend)
        for backend in (case.backend, "reference")
    )
    assert expected.d_ap.isnan().any()
    assert expected.d_an.isnan().any()
    for name in ("anchors", "positives", "negatives"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("d_ap", "d_an"):
        pair = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(*pair, equal_nan=True)


def literal(x: Tensor, y: Tensor, margin: float, semihard: bool) -> Tensor:
    """Anchor by anchor, with plain loops."""
    u = F.normalize(x, dim=1)
    losses = []
    for a in range(len(x)):
        d = [(u[a] - u[i]).norm() for i in range(len(x))]
        near = [d[i] for i in range(len(x)) if y[i] != y[a]]
        far = [d[i] for i in range(len(x)) if y[i] == y[a] and i != a]
        if semihard and far:
            near = [value for value in near if value > max(far)]
        if near and far:
            losses.append(max(far) - min(near) + margin)
    violated = [value for value in losses if value > 0]
    return torch.stack(violated).mean() if violated else 0 * x.sum()


@each_of()
@settings(deadline=None, max_examples=15, database=None, derandomize=True)
@given(
    B=st.integers(0, 14),
    D=st.integers(2, 9),
    classes=st.integers(1, 5),
    margin=st.sampled_from([0.0, 0.2, 1.0]),
    semihard=st.booleans(),
)
def test_any_shape_is_the_definition(
    case: Case, B: int, D: int, classes: int, margin: float, semihard: bool
) -> None:
    x, y = normal(case, B, D, classes, seed=3)
    mining = "batch_semihard" if semihard else "batch_hard"
    loss, gradient = gradient_of(case, x, y, mining=mining, margin=margin)
    leaf = x.requires_grad_()
    wanted = literal(leaf, y, margin, semihard)
    assert_same(loss, wanted.detach(), size=1.0)
    (wanted_gradient,) = torch.autograd.grad(wanted, leaf)
    assert_same(gradient, wanted_gradient, least=1.0)
