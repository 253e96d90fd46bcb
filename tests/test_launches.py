# SPDX-License-Identifier: Apache-2.0
"""How many kernels a training step of each op starts on a GPU, counted without one."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")

from kdkernels.testing import no_interpreter
from kdkernels.testing.steps import steps

# Kernels of Triton and torch in a forward and backward. Lower a bound when a step needs fewer.
MOST_KERNELS = {
    "gram_mse 64x128": 8,
    "gram_mse 256x1024": 8,
    "gram_mse 1024x64, factored": 12,
    "relational_kl 64x128, 1024 keys": 9,
    "info_nce 64x128, 1024 keys": 10,
    "info_nce 64x128, own keys": 9,
    "triplet_loss 64x128, batch_hard": 12,
    "triplet_loss 64x128, batch_all": 17,
    "contrastive_loss 64x128": 13,
    "triplet_distillation 64x128, random": 56,
    "triplet_distillation 64x128, hardest": 11,
    "lsh_bce 64x128, 2048 hashes": 8,
    "pkt 64x128": 12,
    "rkd_distance 64x128": 16,
    "rkd_angle 64x128": 14,
    "correlation 64x100": 7,
    "pairwise 64x128, cosine": 15,
    "pairwise 64x128, euclidean": 11,
}
# KiB that they ask for on the way, in the end as well. Lower a bound when a step needs less.
MOST_KIB = {
    "gram_mse 64x128": 53,
    "gram_mse 256x1024": 3089,
    "gram_mse 1024x64, factored": 605,
    "relational_kl 64x128, 1024 keys": 619,
    "info_nce 64x128, 1024 keys": 483,
    "info_nce 64x128, own keys": 483,
    "triplet_loss 64x128, batch_hard": 24,
    "triplet_loss 64x128, batch_all": 245,
    "contrastive_loss 64x128": 194,
    "triplet_distillation 64x128, random": 540,
    "triplet_distillation 64x128, hardest": 24,
    "lsh_bce 64x128, 2048 hashes": 569,
    "pkt 64x128": 93,
    "rkd_distance 64x128": 99,
    "rkd_angle 64x128": 1009,
    "correlation 64x100": 75,
    "pairwise 64x128, cosine": 61,
    "pairwise 64x128, euclidean": 59,
}
# Steps that start more than eager torch does.
MORE_THAN_EAGER = {
    "triplet_distillation 64x128, random",
}


@pytest.fixture(scope="session")
def counted() -> dict[str, dict[str, Any]]:
    """By the name of the step: what it starts on Triton, and as eager torch."""
    text = no_interpreter.printed("-m", "kdkernels.testing.launches")
    return {entry["step"]: entry for entry in json.loads(text)}


def test_every_step_has_a_bound() -> None:
    assert {step.name for step in steps()} == set(MOST_KERNELS) == set(MOST_KIB)


@pytest.mark.parametrize("step", MOST_KERNELS)
def test_a_step_starts_no_more_kernels_than_its_bound(
    counted: dict[str, dict[str, Any]], step: str
) -> None:
    found = counted[step]["triton"]
    assert found["total"] <= MOST_KERNELS[step], found


@pytest.mark.parametrize("step", MOST_KERNELS)
def test_a_step_starts_no_more_kernels_than_eager_torch(
    counted: dict[str, dict[str, Any]], step: str
) -> None:
    found = counted[step]
    assert found["triton"]["total"] <= found["eager"]["total"] or step in MORE_THAN_EAGER, found


@pytest.mark.parametrize("step", MOST_KIB)
def test_a_step_asks_for_no_more_memory_than_its_bound(
    counted: dict[str, dict[str, Any]], step: str
) -> None:
    assert counted[step]["triton"]["bytes"] <= MOST_KIB[step] << 10
