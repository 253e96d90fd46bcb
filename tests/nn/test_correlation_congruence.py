# SPDX-License-Identifier: Apache-2.0
"""CorrelationCongruenceLoss: the formula of each preset with plain loops, projections, state."""

from __future__ import annotations

import math

import pytest
import torch
from modules import congruence, maps, unit
from torch import Tensor


def gaussian_series(x: Tensor, gamma: float, order: int) -> Tensor:  # [B, B]
    """Each pair's polynomial, with plain loops."""
    return torch.stack([
        torch.stack([
            math.exp(-2 * gamma)
            * sum((2 * gamma * torch.dot(u, v)) ** p / math.factorial(p) for p in range(order + 1))
            for v in x
        ])
        for u in x
    ])  # fmt: skip


@pytest.mark.parametrize(("gamma", "order"), [(None, None), (0.2, 4)])
def test_correlation_congruence_of_the_paper(gamma: float | None, order: int | None) -> None:
    student, teacher = maps(6, 3, 4), maps(6, 20)
    loss = congruence("paper", gamma=gamma, order=order)(student, teacher)
    grams = [
        gaussian_series(unit(x.flatten(1)), gamma or 0.4, order or 2) for x in (student, teacher)
    ]
    torch.testing.assert_close(loss, 0.003 * (grams[0] - grams[1]).pow(2).mean())


def test_correlation_congruence_of_torchdistill() -> None:
    student, teacher, module = maps(6, 3, 4), maps(6, 20), congruence("torchdistill")
    s, t = module.embed_student(student.flatten(1)), module.embed_teacher(teacher)
    difference = gaussian_series(s, 0.4, 2) - gaussian_series(t, 0.4, 2)
    torch.testing.assert_close(
        module(student, teacher), 0.003 * difference.pow(2).sum().sqrt() / 36
    )


def test_correlation_congruence_of_repdistiller() -> None:
    student, teacher, module = maps(6, 3, 4), maps(6, 20), congruence("repdistiller")
    delta = (module.embed_student(student.flatten(1)) - module.embed_teacher(teacher)).abs()
    products = torch.stack([torch.dot(delta[i], delta[i + 1]) for i in range(5)])
    torch.testing.assert_close(module(student, teacher), 0.02 * products.mean())


@pytest.mark.parametrize("B", [0, 1])
def test_neighbours_need_two_samples(B: int) -> None:
    module = congruence("repdistiller")
    loss = module(maps(B, 12), maps(B, 20))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.eq(0).all() for parameter in module.parameters())


def test_unsquared_norm_has_a_zero_gradient_at_equality() -> None:
    module = congruence("torchdistill", student_dim=20)
    module.embed_student.load_state_dict(module.embed_teacher.state_dict())
    x = maps(6, 20).requires_grad_()
    loss = module(x, x)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.eq(0).all()
    assert module.embed_student.weight.grad.eq(0).all()


@pytest.mark.parametrize("preset", ["torchdistill", "repdistiller"])
def test_projections_of_both_sides_are_trained(preset: str) -> None:
    module, student, teacher = (
        congruence(preset),
        maps(6, 12).requires_grad_(),
        maps(6, 20).requires_grad_(),
    )
    module(student, teacher).backward()
    sides = "student", "teacher"
    assert set(module.state_dict()) == {
        f"embed_{side}.{name}" for side in sides for name in ("weight", "bias")
    }
    for parameter in (*module.parameters(), student):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.ne(0).any()
    assert teacher.grad is None


@pytest.mark.parametrize("preset", ["torchdistill", "repdistiller"])
def test_state_survives_a_round_trip(preset: str) -> None:
    student, teacher, module, other = (
        maps(6, 12),
        maps(6, 20),
        congruence(preset),
        congruence(preset),
    )
    assert not torch.equal(module(student, teacher), other(student, teacher))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(student, teacher), other(student, teacher))
