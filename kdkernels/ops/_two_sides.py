# SPDX-License-Identifier: Apache-2.0
"""What losses of a student's matrix against a teacher's share: checks, and the fake of operators
that return the student's gradient with the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks


def check_sides(student: Any, teacher: Any, sample_mask: Any) -> torch.dtype:
    """Two matrices of as many rows, and which rows count; the common dtype."""
    _checks.matrix("student", student)
    _checks.matrix("teacher", teacher)
    _checks.same_device("teacher", teacher, "student", student)
    _checks.same_leading("teacher", teacher, "student", student)
    _checks.sample_mask(sample_mask, "student", student)
    return _checks.common_dtype(student.dtype, teacher.dtype)


def choices(student: Tensor, **_: Any) -> dict[str, str]:
    """For `kdkernels.explain`."""
    if _checks.wants_gradient(student):
        return {"gradient": "in the forward (student requires one)"}
    return {"gradient": "none computed (student requires none)"}


def fake(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Of an operator (student, teacher, ..., need_student, backend) -> (loss, dstudent)."""
    acc = _checks.accumulation_dtype(student.dtype)
    *_, need_student, _ = options
    return (
        student.new_empty((), dtype=acc),
        student.new_empty(student.shape if need_student else (0,), dtype=acc),
    )
