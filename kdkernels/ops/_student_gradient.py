# SPDX-License-Identifier: Apache-2.0
"""What the losses of a student against a constant teacher share: the operator's forward returns
the student's gradient with the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._library import first_order


def two_sides(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """Both matrices checked, of as many rows, in one dtype; the teacher detached."""
    _checks.matrix("student", student)
    _checks.matrix("teacher", teacher)
    _checks.same_device("teacher", teacher, "student", student)
    _checks.same_leading("teacher", teacher, "student", student)
    teacher, student = _checks.same_dtype("teacher", teacher, "student", student)
    return student, teacher.detach()


def needs_gradient(student: Tensor) -> bool:
    return student.requires_grad and torch.is_grad_enabled()


def choices(student: Tensor, *_: Any, **__: Any) -> dict[str, str]:
    """For `kdkernels.explain`."""
    if needs_gradient(student):
        return {"gradient": "in the forward (student requires one)"}
    return {"gradient": "none computed (student requires none)"}


def fake(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Of an operator (student, teacher, ..., need_student, backend) -> (loss, dstudent)."""
    acc = _checks.accumulation_dtype(student.dtype)
    return (
        student.new_empty((), dtype=acc),
        student.new_empty(student.shape if options[-2] else (0,), dtype=acc),
    )


class StudentGradient(torch.autograd.Function):
    """Attaches such an operator to autograd; the backward scales what the forward computed."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        operator: Any,
        options: tuple[Any, ...],
        scale: float,
        backend: str,
    ) -> Tensor:
        loss, dstudent = operator(student, teacher, *options, backend)
        # the student only so that a change of it or a second derivative is refused
        ctx.save_for_backward(dstudent, student)
        ctx.scale = scale
        return loss * scale

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        dstudent, student = ctx.saved_tensors
        return (dout * ctx.scale * dstudent).to(student.dtype), None, None, None, None, None
