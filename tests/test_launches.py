# SPDX-License-Identifier: Apache-2.0
"""How many kernels a training step of each op starts on a GPU, counted without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from kdkernels.testing.steps import steps

# Kernels of Triton and torch in a forward and backward. Lower a bound when a step needs fewer.
MOST_KERNELS = {
    "gram_mse 64x128": 9,
    "gram_mse 256x1024": 9,
    "gram_mse 1024x64, factored": 14,
    "relational_kl 64x128, 1024 keys": 47,
    "info_nce 64x128, 1024 keys": 50,
    "triplet_loss 64x128, batch_hard": 56,
    "triplet_loss 64x128, batch_all": 58,
    "contrastive_loss 64x128": 44,
    "triplet_distillation 64x128, random": 56,
    "triplet_distillation 64x128, hardest": 45,
    "lsh_bce 64x128, 2048 hashes": 9,
    "pkt 64x128": 12,
    "rkd_distance 64x128": 16,
    "rkd_angle 64x128": 14,
    "correlation 64x100": 7,
    "pairwise 64x128, cosine": 15,
    "pairwise 64x128, euclidean": 11,
}


@pytest.fixture(scope="session")
def counted() -> dict[str, dict[str, Any]]:
    """By the name of the step: what it starts on Triton, and as eager torch."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "kdkernels.testing.launches"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {entry["step"]: entry for entry in json.loads(done.stdout)}


def test_every_step_has_a_bound() -> None:
    assert {step.name for step in steps()} == set(MOST_KERNELS)


@pytest.mark.parametrize("step", MOST_KERNELS)
def test_a_step_starts_no_more_kernels_than_its_bound(
    counted: dict[str, dict[str, Any]], step: str
) -> None:
    found = counted[step]["triton"]
    assert found["total"] <= MOST_KERNELS[step], found
