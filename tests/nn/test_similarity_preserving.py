# SPDX-License-Identifier: Apache-2.0
"""SimilarityPreservingLoss: published values, the formula with plain loops, layers, gradients."""

from __future__ import annotations

import pytest
import torch
from modules import maps, similarity_preserving
from values import STUDENT, WIDE_TEACHER

import kdkernels as kd
from kdkernels.testing import numerics

# On STUDENT and WIDE_TEACHER, computed by independent implementations of the public codes; given to
# 12 decimals.
PUBLISHED = {"paper": 0.101637673251, "torchdistill": 0.015451082562}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_similarity_preserving_has_the_published_value(preset: str) -> None:
    loss = kd.nn.SimilarityPreservingLoss(weight=1.0, preset=preset)(STUDENT, WIDE_TEACHER)
    assert abs(loss.item() - PUBLISHED[preset]) <= numerics.FP64_RELATIVE


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
