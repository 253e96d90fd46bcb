# SPDX-License-Identifier: Apache-2.0
"""triplet_distillation: random negatives, the authors' form, and the module."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.ops.triplet_distillation import _draw


def batch(B: int = 50, D: int = 10, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    student, teacher = torch.randn(B, D, dtype=dtype), torch.randn(B, D, dtype=dtype)
    return student.requires_grad_(), teacher, torch.randint(5, (B,))


def test_random_negatives_give_the_loss_of_torch() -> None:
    student, teacher, labels = batch()
    loss = kd.triplet_distillation(student, teacher, labels, generator=seeded(3))
    negative, kept = _draw(labels, seeded(3))
    expected = torch.nn.TripletMarginLoss(margin=5.0)(teacher, student, student[negative])
    assert kept.all()
    torch.testing.assert_close(loss, expected)
    for out, true in zip(gradient(loss, student), gradient(expected, student), strict=True):
        torch.testing.assert_close(out, true)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(loss: Tensor, source: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, source)


def test_negatives_are_drawn_uniformly_from_other_classes() -> None:
    labels = torch.tensor([4, 4, -1, 7, 7, 7])
    allowed = {0: {2, 3, 4, 5}, 2: {0, 1, 3, 4, 5}, 3: {0, 1, 2}}
    draws = 4000
    seen: dict[int, Counter[int]] = {row: Counter() for row in allowed}
    generator = seeded(0)
    for _ in range(draws):
        negative, _ = _draw(labels, generator)
        for row, counter in seen.items():
            counter[int(negative[row])] += 1
    for row, rows in allowed.items():
        assert set(seen[row]) == rows
        mean = draws / len(rows)
        # six standard deviations of a binomial count
        assert (
            max(abs(n - mean) for n in seen[row].values()) < 6 * (mean * (1 - 1 / len(rows))) ** 0.5
        )


def test_the_generator_decides() -> None:
    student, teacher, labels = batch()

    def loss(seed: int) -> Tensor:
        return kd.triplet_distillation(student, teacher, labels, generator=seeded(seed))

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))


@pytest.mark.parametrize("negatives", ["random", "hardest", "semihard"])
def test_one_class_and_an_empty_batch_give_zero(negatives: str) -> None:
    for B in (0, 1, 6):
        student = torch.randn(B, 3, requires_grad=True)
        labels = torch.zeros(B, dtype=torch.int64)
        loss = kd.triplet_distillation(student, torch.randn(B, 3), labels, negatives=negatives)
        (grad,) = gradient(loss, student)
        assert loss == 0
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("negatives", ["random", "hardest", "semihard"])
def test_compiles_without_a_graph_break(negatives: str) -> None:
    student, teacher, labels = batch()

    def step(student: Tensor) -> Tensor:
        return kd.triplet_distillation(student, teacher, labels, negatives=negatives)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = step(student)
    torch.manual_seed(0)
    loss = compiled(student)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student))


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, labels = batch()
    teacher.requires_grad_()
    for negatives in ("random", "hardest"):
        loss = kd.triplet_distillation(student, teacher, labels, negatives=negatives)
        loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
