# SPDX-License-Identifier: Apache-2.0
"""The modules on pairs: values and gradients of the formulas, options, state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd

CONTRASTIVE, PAIRS = kd.nn.ContrastiveLoss, kd.nn.PairDistillationLoss


def rows(B: int = 12, D: int = 4) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64, requires_grad=True)


def labels(B: int = 12) -> Tensor:
    return torch.arange(B) % 3


def pair_loss(x: Tensor, r: Tensor, same: bool, margin: float) -> Tensor:
    d = (x - r).norm()
    return (d if same else (margin - d).clamp_min(0)).square() / 2


def assert_same(loss: Tensor, expected: Tensor, *sources: Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(of, sources, retain_graph=True) for of in (loss, expected)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_default_is_the_published_sum_over_the_number_of_pairs() -> None:
    x, y = rows(), labels()
    unit = x / x.norm(dim=1, keepdim=True)
    losses = torch.stack([
        pair_loss(unit[i], unit[j], bool(y[i] == y[j]), 1.0) for i in range(12) for j in range(i)
    ])  # fmt: skip
    assert_same(CONTRASTIVE()(x, y), losses.mean(), x)
    assert losses.eq(0).any()
    nonzero = losses.sum() / (losses > 0).sum()
    assert_same(CONTRASTIVE(reduction="mean_nonzero")(x, y), nonzero, x)


def test_options_are_those_of_the_function() -> None:
    x, y, r, r_y = rows(), labels(), rows(7), labels(7)
    options: dict[str, Any] = {
        "margin": 2.0, "distance": "sqeuclidean", "normalize_embeddings": False, "reduction": "sum",
    }  # fmt: skip
    loss = CONTRASTIVE(3, **options, backend="reference")(x, y, r, r_y)
    expected = kd.contrastive_loss(x, y, references=r, reference_labels=r_y, **options)
    assert_same(loss, 3 * expected, x, r)


def test_distillation_pairs_each_student_with_each_teacher() -> None:
    student, teacher, y = rows(), rows(), labels()
    losses = [
        pair_loss(student[i], teacher[j].detach(), bool(y[i] == y[j]), 5.0)
        for i in range(12)
        for j in range(12)
    ]
    loss = PAIRS(weight=0.5)(student, teacher, y)
    assert_same(loss, 0.5 * torch.stack(losses).mean(), student)
    loss = PAIRS()(student, teacher, y)
    loss.backward()
    assert teacher.grad is None


def test_a_student_that_is_its_own_teacher() -> None:
    """Rows at distance 0 pull nowhere, and the teacher stays a constant."""
    x, y = rows(), labels()
    assert_same(PAIRS()(x, x, y), PAIRS()(x, x.detach().clone(), y), x)


@pytest.mark.parametrize("B", [0, 1])
def test_batches_with_no_pair(B: int) -> None:
    x, y = rows(B), labels(B)
    for loss in (CONTRASTIVE()(x, y), PAIRS()(x, x, y)):
        assert loss.item() == 0
        assert torch.autograd.grad(loss, x)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_wide(dtype: torch.dtype) -> None:
    student, teacher = (rows().detach().to(dtype).requires_grad_() for _ in range(2))
    for loss in (CONTRASTIVE()(student, labels()), PAIRS()(student, teacher, labels())):
        assert loss.dtype == torch.float32
        (grad,) = torch.autograd.grad(loss, student)
        assert grad.dtype == dtype
        assert grad.isfinite().all()


@pytest.mark.parametrize("make", [CONTRASTIVE, PAIRS])
def test_compiles_into_one_graph(make: type[nn.Module]) -> None:
    x, teacher, y = rows(), rows(), labels()
    module, inputs = make(), (x, y) if make is CONTRASTIVE else (x, teacher, y)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs), module(*inputs), x)


def test_names_its_options_and_has_no_state() -> None:
    assert repr(CONTRASTIVE(2)) == (
        "ContrastiveLoss(weight=2, margin=1, distance='euclidean', normalize_embeddings=True, "
        "reduction='mean', backend='auto')"
    )
    assert repr(PAIRS()) == "PairDistillationLoss(weight=1, margin=5, backend='auto')"
    assert CONTRASTIVE().state_dict() == PAIRS().state_dict() == {}


@pytest.mark.parametrize("make", [CONTRASTIVE, PAIRS])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"margin": -0.1}, ValueError, "margin must be a finite number that is not negative"),
        ({"margin": "1"}, TypeError, "margin must be a number, got str"),
        ({"weight": math.inf}, ValueError, "weight must be a finite number"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(
    make: type[nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distance": "l1"}, ValueError, "distance must be one of 'euclidean', "),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'mean_nonzero', "),
        ({"normalize_embeddings": 0}, TypeError, "normalize_embeddings must be True or False"),
    ],
)
def test_bad_options_of_contrastive(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CONTRASTIVE(**options)


def test_bad_inputs() -> None:
    x, y = rows(), labels()
    with pytest.raises(ValueError, match="reference_labels must be given"):
        CONTRASTIVE()(x, y, x)
    with pytest.raises(ValueError, match=r"teacher must have shape \[12, 4\] like student"):
        PAIRS()(x, x[:, :3], y)
    with pytest.raises(TypeError, match=r"teacher must be torch.float64 like student"):
        PAIRS()(x, x.float(), y)
    with pytest.raises(ValueError, match=r"labels must have shape \[12\] like the rows of student"):
        PAIRS()(x, x, y[:5])
    with pytest.raises(TypeError, match=r"teacher must be a torch.Tensor, got list"):
        PAIRS()(x, [x], y)
