# SPDX-License-Identifier: Apache-2.0
"""TripletDistillationLoss and PairDistillationLoss: values and gradients of the formulas, options,
state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from modules import assert_same_loss, pair_loss
from torch import Tensor

import kdkernels as kd

PAIRS, TRIPLETS = kd.nn.PairDistillationLoss, kd.nn.TripletDistillationLoss


def rows(B: int = 12, D: int = 4) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64, requires_grad=True)


def labels(B: int = 12) -> Tensor:
    return torch.arange(B) % 3


def test_distillation_pairs_each_student_with_each_teacher() -> None:
    student, teacher, y = rows(), rows(), labels()
    losses = [
        pair_loss(student[i], teacher[j].detach(), bool(y[i] == y[j]), 5.0)
        for i in range(12)
        for j in range(12)
    ]
    loss = PAIRS(weight=0.5)(student, teacher, y)
    assert_same_loss(loss, 0.5 * torch.stack(losses).mean(), student)
    loss = PAIRS()(student, teacher, y)
    loss.backward()
    assert teacher.grad is None


def test_a_student_that_is_its_own_teacher() -> None:
    """Rows at distance 0 have no gradient, and the teacher stays a constant."""
    x, y = rows(), labels()
    assert_same_loss(PAIRS()(x, x, y), PAIRS()(x, x.detach().clone(), y), x)


@pytest.mark.parametrize("B", [0, 1])
def test_batches_with_no_pair(B: int) -> None:
    x, y = rows(B), labels(B)
    loss = PAIRS()(x, x, y)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_wide(dtype: torch.dtype) -> None:
    student, teacher = (rows().detach().to(dtype).requires_grad_() for _ in range(2))
    loss = PAIRS()(student, teacher, labels())
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_compiles_into_one_graph() -> None:
    student, teacher, y = rows(), rows(), labels()
    module = PAIRS()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_loss(compiled(student, teacher, y), module(student, teacher, y), student)


def test_names_its_options_and_has_no_state() -> None:
    assert repr(PAIRS()) == (
        "PairDistillationLoss(weight=1, margin=5, ignore_index=None, backend='auto')"
    )
    assert PAIRS().state_dict() == {}


def test_module_weighs_the_function() -> None:
    student, teacher = rows(50, 10), rows(50, 10).detach()
    labels = torch.randint(5, (50,))
    module = TRIPLETS(negatives="hardest", margin=1)
    expected = 2 * kd.triplet_distillation(
        student, teacher, labels, negatives="hardest", margin=1.0
    )
    torch.testing.assert_close(module(student, teacher, labels), expected)
    assert repr(module) == (
        "TripletDistillationLoss(weight=2, margin=1, negatives='hardest', ignore_index=None, "
        "backend='auto')"
    )
    random = TRIPLETS()
    first, second = (
        random(student, teacher, labels, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"margin": -0.1}, ValueError, "margin must be a finite number that is not negative"),
        ({"margin": "1"}, TypeError, "margin must be a number, got str"),
        ({"weight": math.inf}, ValueError, "weight must be a finite number"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options_of_pairs(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PAIRS(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": "easy"}, "negatives must be one of"),
        ({"margin": -1.0}, "margin must be a finite number that is not negative"),
        ({"weight": float("nan")}, "weight must be a finite number"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TRIPLETS(**options)


def test_bad_inputs() -> None:
    x, y = rows(), labels()
    with pytest.raises(ValueError, match=r"teacher must have shape \[12, 4\] like student"):
        PAIRS()(x, x[:, :3], y)
    with pytest.raises(ValueError, match=r"labels must have shape \[12\] like the rows of student"):
        PAIRS()(x, x, y[:5])
    with pytest.raises(TypeError, match=r"teacher must be a torch.Tensor, got list"):
        PAIRS()(x, [x], y)
