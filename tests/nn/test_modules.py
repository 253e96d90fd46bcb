# SPDX-License-Identifier: Apache-2.0
"""The modules: values of the published formulas, state, composition with torch, arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd

# Similarity preserving on waves(8, 16, ...) and waves(8, 24, ...), computed by independent
# implementations of the public codes; given to 12 decimals, hence the bound.
PUBLISHED_SP = {"values": {"paper": 0.101637673251, "torchdistill": 0.015451082562}, "bound": 1e-10}
PRESETS = tuple(PUBLISHED_SP["values"])


def waves(B: int, D: int, a: float, b: float, c: float) -> Tensor:  # [B, D]
    i, d = torch.arange(B, dtype=torch.float64)[:, None], torch.arange(D, dtype=torch.float64)
    return torch.sin(a * i + b * d + c) + 0.3 * torch.cos(0.05 * i * d + c)


def student_waves() -> Tensor:
    return waves(8, 16, 0.9, 0.31, 0.5)


def teacher_waves() -> Tensor:
    return waves(8, 24, 0.7, 0.23, 0.1)


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def similarity_preserving(student: Tensor, teacher: Tensor, p: int) -> Tensor:
    """Entry by entry, with plain loops."""
    B, total = len(student), torch.zeros((), dtype=torch.float64)
    for i in range(B):
        rows = [
            torch.stack([torch.dot(x[i].flatten(), x[j].flatten()) for j in range(B)])
            for x in (student, teacher)
        ]
        rows = [row / row.abs().pow(p).sum().pow(1 / p) for row in rows]
        total = total + (rows[0] - rows[1]).pow(2).sum()
    return total / B**2


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


def unit_rows(x: Tensor) -> Tensor:
    return torch.stack([row / row.pow(2).sum().sqrt() for row in x])


def congruence(preset: str, **options: Any) -> nn.Module:
    dims = {} if preset == "paper" else {"student_dim": 12, "teacher_dim": 20, "feature_dim": 6}
    return kd.nn.CorrelationCongruenceLoss(preset=preset, **{**dims, **options}).double()


@pytest.mark.parametrize("preset", PRESETS)
def test_similarity_preserving_has_the_published_value(preset: str) -> None:
    loss = kd.nn.SimilarityPreservingLoss(weight=1.0, preset=preset)(
        student_waves(), teacher_waves()
    )
    assert abs(loss.item() - PUBLISHED_SP["values"][preset]) <= PUBLISHED_SP["bound"]


@pytest.mark.parametrize(
    ("preset", "p", "weight"), [("paper", 2, 3000.0), ("torchdistill", 1, 1.0)]
)
def test_similarity_preserving_of_maps(preset: str, p: int, weight: float) -> None:
    student, teacher = maps(6, 3, 4, 2), maps(6, 5, 7)
    loss = kd.nn.SimilarityPreservingLoss(preset=preset)(student, teacher)
    assert loss.shape == ()
    torch.testing.assert_close(loss, weight * similarity_preserving(student, teacher, p))


def test_similarity_preserving_sums_over_layer_pairs() -> None:
    student, teacher = [maps(6, 3, 4), maps(6, 9)], (maps(6, 5), maps(6, 2, 2, 3))
    loss = kd.nn.SimilarityPreservingLoss(weight=7)(student, teacher)
    expected = sum(similarity_preserving(s, t, 2) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(loss, 7 * expected)


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
def test_algorithm_changes_no_value(algorithm: str) -> None:
    student, teacher = maps(9, 4), maps(9, 5)
    loss = kd.nn.SimilarityPreservingLoss(1.0, algorithm=algorithm)(student, teacher)
    torch.testing.assert_close(loss, similarity_preserving(student, teacher, 2))


def test_gradients_are_those_of_the_formula_and_spare_the_teacher() -> None:
    student, teacher = maps(5, 3, 4).requires_grad_(), maps(5, 6).requires_grad_()
    kd.nn.SimilarityPreservingLoss(weight=2)(student, teacher).backward()
    assert teacher.grad is None
    (expected,) = torch.autograd.grad(2 * similarity_preserving(student, teacher, 2), student)
    torch.testing.assert_close(student.grad, expected)


def test_intra_utterance_similarity_is_the_mean_over_utterances() -> None:
    student, teacher = maps(3, 7, 4), maps(3, 7, 5)
    loss = kd.nn.IntraUtteranceSimilarityLoss(weight=5)(student, teacher)
    per_utterance = [similarity_preserving(s, t, 2) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(loss, 5 * torch.stack(per_utterance).mean())
    both = kd.nn.IntraUtteranceSimilarityLoss(weight=5)([student, student], [teacher, teacher])
    torch.testing.assert_close(both, 2 * loss)


@pytest.mark.parametrize(("gamma", "order"), [(None, None), (0.2, 4)])
def test_correlation_congruence_of_the_paper(gamma: float | None, order: int | None) -> None:
    student, teacher = maps(6, 3, 4), maps(6, 20)
    loss = congruence("paper", gamma=gamma, order=order)(student, teacher)
    grams = [
        gaussian_series(unit_rows(x.flatten(1)), gamma or 0.4, order or 2)
        for x in (student, teacher)
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


@pytest.mark.parametrize(
    "module",
    [kd.nn.SimilarityPreservingLoss(), kd.nn.IntraUtteranceSimilarityLoss(), kd.nn.RKDLoss()],
)
def test_losses_without_parameters_have_no_state(module: nn.Module) -> None:
    assert not module.state_dict()
    module.load_state_dict({}, strict=True)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "sp": (kd.nn.SimilarityPreservingLoss, (6, 3, 4), (6, 20)),
    "sp-torchdistill": (
        lambda: kd.nn.SimilarityPreservingLoss(preset="torchdistill"),
        (6, 3, 4),
        (6, 20),
    ),
    "iusp": (kd.nn.IntraUtteranceSimilarityLoss, (2, 6, 3), (2, 6, 4)),
    "rkd": (kd.nn.RKDLoss, (6, 3, 4), (6, 20)),
    "cc-paper": (lambda: congruence("paper"), (6, 3, 4), (6, 20)),
    "cc-torchdistill": (lambda: congruence("torchdistill"), (6, 3, 4), (6, 20)),
    "cc-repdistiller": (lambda: congruence("repdistiller"), (6, 3, 4), (6, 20)),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiles_without_a_graph_break(name: str) -> None:
    make, student_shape, teacher_shape = MODULES[name]
    module, teacher = make(), maps(*teacher_shape)
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        student = torch.linspace(-1, 1, math.prod(student_shape), dtype=torch.float64).reshape(
            student_shape
        )
        student = student.sin().requires_grad_()
        loss = call(student, teacher)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", MODULES)
def test_losses_of_half_precision_come_back_in_fp32_under_autocast(name: str) -> None:
    make, student_shape, teacher_shape = MODULES[name]
    module = make().float()
    student, teacher = (
        maps(*student_shape).bfloat16().requires_grad_(),
        maps(*teacher_shape).float(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_not_a_number_stays_one(name: str) -> None:
    make, student_shape, teacher_shape = MODULES[name]
    student = maps(*student_shape)
    student[1] = math.nan
    assert make()(student, maps(*teacher_shape)).isnan()


def test_repr_names_the_meaning() -> None:
    assert repr(kd.nn.SimilarityPreservingLoss()) == (
        "SimilarityPreservingLoss(weight=3000, preset='paper', algorithm='auto', backend='auto')"
    )
    assert repr(kd.nn.IntraUtteranceSimilarityLoss(2)) == (
        "IntraUtteranceSimilarityLoss(weight=2, algorithm='auto', backend='auto')"
    )
    assert repr(kd.nn.RKDLoss()) == (
        "RKDLoss(distance_weight=25, angle_weight=50, preset='repdistiller', backend='auto')"
    )
    assert repr(kd.nn.CorrelationCongruenceLoss()) == (
        "CorrelationCongruenceLoss("
        "weight=0.003, preset='paper', gamma=0.4, order=2, backend='auto')"
    )
    embedded = repr(congruence("repdistiller"))
    assert "weight=0.02, preset='repdistiller'" in embedded
    assert "gamma" not in embedded
    assert "(embed_teacher): Linear(in_features=20, out_features=6, bias=True)" in embedded
