# SPDX-License-Identifier: Apache-2.0
"""The triplet modules: presets against the published formulas and pytorch-metric-learning, options,
state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import values
from torch import Tensor, nn

import kdkernels as kd

HARD, SEMIHARD, ALL = (
    kd.nn.BatchHardTripletLoss,
    kd.nn.BatchSemiHardTripletLoss,
    kd.nn.BatchAllTripletLoss,
)
# Presets that take each anchor as its own positive, and their margins.
SELF_POSITIVE = {
    "hermans": 0.0, "torchreid": 0.3, "tensorflow-addons": 1.0, "sentence-transformers": 5.0
}  # fmt: skip
TORCHREID_FLOOR = 1e-6  # of its distances

Distances = list[tuple[list[Tensor], list[Tensor]]]


def batch(B: int = 24, D: int = 6, classes: int = 5, apart: float = 0.0) -> tuple[Tensor, Tensor]:
    """Labels that leave one row without a positive; two of the classes moved away if asked."""
    labels = torch.arange(B) % classes
    labels[3] = 77
    moved = apart * torch.nn.functional.one_hot(labels % D, D) * (labels < 2)[:, None]
    return (torch.randn(B, D, dtype=torch.float64) + moved).requires_grad_(), labels


def assert_same(loss: Tensor, expected: Tensor, *sources: Tensor) -> None:
    """Values and gradients."""
    gradients = (torch.autograd.grad(of, sources) for of in (loss, expected))
    for found, wanted in [(loss, expected), *zip(*gradients, strict=True)]:
        values.assert_same(found, wanted, least=1.0)


def per_anchor(x: Tensor, y: Tensor) -> Distances:
    """Distances to the positives and to the negatives of each anchor, pair by pair."""
    return [
        (
            [(x[a] - x[i]).norm() for i in range(len(x)) if i != a and y[i] == y[a]],
            [(x[a] - x[i]).norm() for i in range(len(x)) if y[i] != y[a]],
        )
        for a in range(len(x))
    ]


def metric_learning(name: str) -> Any:
    return pytest.importorskip(f"pytorch_metric_learning.{name}")


def test_default_is_the_function() -> None:
    x, y = batch()
    assert_same(HARD()(x, y), kd.triplet_loss(x, y), x)
    assert_same(SEMIHARD()(x, y), kd.triplet_loss(x, y, mining="batch_semihard"), x)
    assert_same(ALL()(x, y), kd.triplet_loss(x, y, mining="batch_all"), x)


@pytest.mark.parametrize("smooth", [False, True], ids=["hinge", "smooth"])
@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@pytest.mark.parametrize(
    ("make", "negatives"), [(HARD, "hard"), (SEMIHARD, "semihard"), (ALL, None)]
)
@pytest.mark.parametrize("shape", [(24, 6, 5), (41, 3, 9)])
def test_preset_of_pytorch_metric_learning(
    make: type[nn.Module],
    negatives: str | None,
    bank: bool,
    smooth: bool,
    shape: tuple[int, int, int],
) -> None:
    (x, y), (r, r_y) = batch(*shape), batch(17, shape[1])
    extra = (r, r_y) if bank else ()
    mined = None
    if negatives is not None:
        mined = metric_learning("miners").BatchEasyHardMiner("hard", negatives)(x, y, *extra)
    expected = metric_learning("losses").TripletMarginLoss(smooth_loss=smooth)(x, y, mined, *extra)
    assert expected > 0
    loss = make("pytorch-metric-learning", soft=smooth)(x, y, *extra)
    assert_same(loss, expected, x, *extra[:1])


@pytest.mark.parametrize("apart", [0.0, 20.0])
@pytest.mark.parametrize("preset", SELF_POSITIVE)
def test_presets_that_count_every_anchor(preset: str, apart: float) -> None:
    """Row 3 has no positive, and counts with a distance of 0."""
    x, y = batch(apart=apart)
    u = [
        (max(positives) if positives else 0) - min(negatives) + SELF_POSITIVE[preset]
        for positives, negatives in per_anchor(x, y)
    ]
    if preset == "hermans":
        losses = torch.stack([torch.log1p(torch.exp(value)) for value in u])
    else:
        losses = torch.stack(u).clamp_min(0)
        assert losses.eq(0).sum() > 1 or not apart
    assert_same(HARD(preset)(x, y), losses.mean(), x)


def test_distances_of_torchreid_are_raised_to_a_floor() -> None:
    """The one difference: its anchor without a positive is as far from itself as the floor."""
    x, y = batch()
    x = (0.05 * x.detach()).requires_grad_()
    losses = []
    for a in range(len(x)):
        # the anchor is among its positives
        d = (x[a] - x).square().sum(1).clamp_min(TORCHREID_FLOOR**2).sqrt()
        losses.append((d[y == y[a]].max() - d[y != y[a]].min() + 0.3).clamp_min(0))
    assert losses[3] > 0
    loss = HARD("torchreid")(x, y)
    assert_same(loss + TORCHREID_FLOOR / len(x), torch.stack(losses).mean(), x)


@pytest.mark.parametrize("preset", ["tensorflow-addons", "sentence-transformers"])
@pytest.mark.parametrize("one_class", [False, True], ids=["classes", "one_class"])
def test_a_missing_negative_elsewhere(preset: str, one_class: bool) -> None:
    """They take the row's largest distance for it, which adds the margin and no gradient."""
    x, y = batch()
    y = torch.zeros_like(y) if one_class else y
    losses = []
    for positives, negatives in per_anchor(x, y):
        row = [*positives, *negatives]
        d_ap, d_an = max(positives, default=0 * row[0]), min(negatives, default=max(row))
        losses.append((d_ap - d_an + SELF_POSITIVE[preset]).clamp_min(0))
    added = SELF_POSITIVE[preset] if one_class else 0
    assert_same(HARD(preset)(x, y) + added, torch.stack(losses).mean(), x)


@pytest.mark.parametrize("apart", [0.0, 20.0])
@pytest.mark.parametrize(
    ("preset", "margin"), [("tensorflow-addons", 1), ("sentence-transformers", 5)]
)
def test_presets_with_a_negative_for_each_pair(preset: str, margin: float, apart: float) -> None:
    x, y = batch(apart=apart)
    losses, without = [], 0
    for positives, negatives in per_anchor(x, y):
        for d_ap in positives:
            beyond = [d_an for d_an in negatives if d_an > d_ap]
            without += not beyond
            d_an = min(beyond) if beyond else max(negatives)
            losses.append((d_ap - d_an + margin).clamp_min(0))
    assert (without > 0) == (apart == 0)
    assert_same(SEMIHARD(preset)(x, y), torch.stack(losses).mean(), x)


def every_triplet(x: Tensor, y: Tensor, margin: float) -> Tensor:
    return torch.stack([
        d_ap - d_an + margin
        for positives, negatives in per_anchor(x, y)
        for d_ap in positives
        for d_an in negatives
    ])  # fmt: skip


def test_batch_all_of_hermans() -> None:
    x, y = batch()
    losses = torch.log1p(torch.exp(every_triplet(x, y, 0.0)))
    assert_same(ALL("hermans")(x, y), losses.mean(), x)


def test_batch_all_of_sentence_transformers() -> None:
    x, y = batch(apart=20.0)
    losses = every_triplet(x, y, 5.0).clamp_min(0)
    assert 0 < (losses > 0).sum() < len(losses)
    assert_same(ALL("sentence-transformers")(x, y), losses.sum() / (losses > 0).sum(), x)


EVERY_PRESET = [(make, preset) for make in (HARD, SEMIHARD, ALL) for preset in make.presets]


@pytest.mark.parametrize(("make", "preset"), EVERY_PRESET)
def test_batches_without_a_triplet_give_zero(make: type[nn.Module], preset: str) -> None:
    x, y = batch()
    batches = [torch.zeros_like(y), torch.arange(len(y))]  # one class, and all labels distinct
    for labels in batches[:1] if make is HARD and preset in SELF_POSITIVE else batches:
        loss = make(preset)(x, labels)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, x)[0].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean_nonzero", "mean", "sum", "mean_batch"])
def test_reductions_of_what_was_mined(reduction: str) -> None:
    x, y = batch(apart=10.0)
    each = HARD(reduction="none", margin=0.1)(x, y)
    kept = kd.mine_triplets(x, y).anchors
    divisor = {
        "mean_nonzero": (each > 0).sum(), "mean": len(kept), "sum": 1, "mean_batch": len(x)
    }[reduction]  # fmt: skip
    assert 0 < (each > 0).sum() < len(kept) < len(x)
    assert_same(HARD(reduction=reduction, margin=0.1)(x, y), each.sum() / divisor, x)


@pytest.mark.parametrize(("make", "preset"), EVERY_PRESET)
def test_an_empty_batch(make: type[nn.Module], preset: str) -> None:
    x, y = batch()
    loss = make(preset)(x[:0], y[:0])
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


def test_options_come_before_the_preset() -> None:
    x, y = batch()
    options: dict[str, Any] = {
        "margin": 0.4, "soft": True, "distance": "sqeuclidean", "normalize_embeddings": False,
        "reduction": "mean",
    }  # fmt: skip
    for make, preset, mining in (
        (HARD, "pytorch-metric-learning", "batch_hard"),
        (SEMIHARD, "tensorflow-addons", "pair_semihard"),
        (ALL, "sentence-transformers", "batch_all"),
    ):
        loss = make(preset, **options, weight=3, backend="reference")(x, y)
        assert_same(loss, 3 * kd.triplet_loss(x, y, mining=mining, **options), x)


def test_references_receive_gradients() -> None:
    (x, y), (r, r_y) = batch(), batch(17)
    SEMIHARD()(x, y, references=r, reference_labels=r_y).backward()
    assert x.grad.ne(0).any()
    assert r.grad.ne(0).any()


@pytest.mark.parametrize(
    ("make", "preset"),
    [(HARD, "default"), (HARD, "hermans"), (SEMIHARD, "tensorflow-addons"), (ALL, "default")],
)
def test_compiles_into_one_graph(make: type[nn.Module], preset: str) -> None:
    x, y = batch()
    module = make(preset)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, y), module(x, y), x)


def test_names_its_options_and_has_no_state() -> None:
    assert repr(HARD("hermans")) == (
        "BatchHardTripletLoss(preset='hermans', margin=0, soft=True, distance='euclidean', "
        "normalize_embeddings=False, ignore_index=None, reduction='mean_batch', weight=1, "
        "backend='auto')"
    )
    assert repr(SEMIHARD(weight=2)) == (
        "BatchSemiHardTripletLoss(preset='default', margin=0.2, soft=False, distance='euclidean', "
        "normalize_embeddings=True, ignore_index=None, reduction='mean_nonzero', weight=2, "
        "backend='auto')"
    )
    assert repr(ALL("hermans")) == (
        "BatchAllTripletLoss(preset='hermans', margin=0, soft=True, distance='euclidean', "
        "normalize_embeddings=False, ignore_index=None, reduction='mean', weight=1, "
        "backend='auto')"
    )
    assert HARD().state_dict() == {}
    assert list(SEMIHARD().parameters()) == []


@pytest.mark.parametrize("make", [HARD, SEMIHARD, ALL])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": "facenet"}, ValueError, "preset must be one of 'default', "),
        ({"margin": -0.1}, ValueError, "margin must be a finite number that is not negative"),
        ({"margin": math.nan}, ValueError, "margin must be a finite number that is not negative"),
        ({"margin": "soft"}, TypeError, "margin must be a number, got str"),
        ({"soft": 1}, TypeError, "soft must be True or False, got int"),
        ({"normalize_embeddings": 0}, TypeError, "normalize_embeddings must be True or False"),
        ({"distance": "l1"}, ValueError, "distance must be one of 'euclidean', "),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean_nonzero', "),
        ({"weight": -1}, ValueError, "weight must be a finite number that is not negative, got -1"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(
    make: type[nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        make(**options)
    assert message in str(raised.value)


def test_bad_inputs() -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="preset must be one of 'default', 'pytorch-metric"):
        SEMIHARD("hermans")
    sums = "reduction must be one of 'mean_nonzero', 'mean', 'sum', got 'none'"
    for make, preset in ((ALL, "default"), (SEMIHARD, "tensorflow-addons")):
        with pytest.raises(ValueError, match=sums):
            make(preset, reduction="none")
    for extra in ((x, y), (x,), (None, y)):
        with pytest.raises(ValueError, match="references must be left out with preset='hermans'"):
            HARD("hermans")(x, y, *extra)
    with pytest.raises(ValueError, match=r"references must be left out .*, and exclude"):
        HARD("hermans")(x, y, exclude=y)
    with pytest.raises(ValueError, match="reference_labels must be given"):
        HARD()(x, y, x)
    with pytest.raises(ValueError, match=r"labels must have shape \[24\]"):
        HARD()(x, y[:23])
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        SEMIHARD()(x, y.float())
    with pytest.raises(ValueError, match="embeddings must have 2 dimensions"):
        HARD()(x[:, :, None], y)
