# SPDX-License-Identifier: Apache-2.0
"""RKDLoss: its presets, by the eager formulas, and its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import maps

import kdkernels as kd
from kdkernels.testing.opinfos.rkd import eager_angle, eager_distance

PRESETS: dict[str, tuple[float, float, bool, bool]] = {
    "repdistiller": (25, 50, False, False),
    "lenscloth": (1, 2, False, True),
    "torchdistill": (1, 2, False, False),
    "mmrazor": (25, 50, True, True),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_of_the_module(preset: str) -> None:
    distance, angle, unit_student, unit_teacher = PRESETS[preset]
    student, teacher = maps(6, 3, 4), maps(6, 20)
    s = F.normalize(student.flatten(1), dim=1) if unit_student else student.flatten(1)
    t = F.normalize(teacher, dim=1) if unit_teacher else teacher
    expected = distance * eager_distance(s, t) + angle * eager_angle(s, t)
    torch.testing.assert_close(kd.nn.RKDLoss(preset=preset)(student, teacher), expected)


def test_the_module_leaves_out_what_weighs_nothing_and_adds_layers() -> None:
    pairs = [maps(6, 3, 4), maps(6, 5)], [maps(6, 20), maps(6, 4)]
    only = kd.nn.RKDLoss(3.0, 0.0)(*pairs)
    expected = sum(3 * eager_distance(s.flatten(1), t) for s, t in zip(*pairs, strict=True))
    torch.testing.assert_close(only, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": "mine"}, ValueError, "preset must be one of 'repdistiller', 'lenscloth'"),
        ({"distance_weight": -1}, ValueError, "distance_weight must be a finite number"),
        ({"angle_weight": "2"}, TypeError, "angle_weight must be a number, got str"),
        ({"distance_weight": 0, "angle_weight": 0}, ValueError, "angle_weight must be above 0"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_the_module_names_what_does_not_fit(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kd.nn.RKDLoss(**options)
