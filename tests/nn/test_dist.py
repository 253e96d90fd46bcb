# SPDX-License-Identifier: Apache-2.0
"""DISTLoss: its presets, by the definition."""

from __future__ import annotations

import pytest
import torch
from modules import maps

import kdkernels as kd
from kdkernels.reference import _correlation as correlation_reference

DIST = kd.nn.DISTLoss


@pytest.mark.parametrize(("preset", "temperature"), [("imagenet", 1.0), ("cifar", 4.0)])
def test_dist_presets(preset: str, temperature: float) -> None:
    student, teacher = maps(6, 5), maps(6, 5)
    expected = 2 * correlation_reference.correlation(student, teacher, temperature=temperature)
    torch.testing.assert_close(DIST(preset=preset)(student, teacher), expected)
    one_sided = DIST(1.0, beta=0.0, gamma=3.0, temperature=2.5)(student, teacher)
    expected = correlation_reference.correlation(
        student, teacher, temperature=2.5, row_weight=0.0, column_weight=3.0
    )
    torch.testing.assert_close(one_sided, expected)


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"teacher must have shape \[6, 5\] like student"):
        DIST()(maps(6, 5), maps(6, 4))
