# SPDX-License-Identifier: Apache-2.0
"""rkd: distances and angles within a batch, the student's against the teacher's.

Everything comes from distances between rows: an angle at one of three rows is a function of their
three distances. Angles are never in memory, and distances are B x B numbers for the angles only.
Derivation: docs/ops/rkd.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, requested_backend
from kdkernels._library import define_operator, first_order

# Results of the forward, the same for every backend; fp64 for fp64 inputs, else fp32:
#   loss      []        mean over B^2 pairs or B^3 triples
#   dstudent  [B, D_s]  derivative of the loss; [0] unless needed
#   dteacher  [B, D_t]  likewise
# Distances are NaN to and from a row whose squared norm is not below a quarter of the largest
# number, and every result is then NaN.


def _fwd_fake(
    student: Tensor, teacher: Tensor, relation: str, need_student: bool, need_teacher: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = _checks.accumulation_dtype(student.dtype)
    return (
        student.new_empty((), dtype=acc),
        student.new_empty(student.shape if need_student else (0,), dtype=acc),
        student.new_empty(teacher.shape if need_teacher else (0,), dtype=acc),
    )


_fwd = define_operator(
    "rkd",
    "fwd",
    "(Tensor student, Tensor teacher, str relation, bool need_student, bool need_teacher, "
    "str backend) -> (Tensor loss, Tensor dstudent, Tensor dteacher)",
    _fwd_fake,
)


class RKDFunction(torch.autograd.Function):
    """A loss whose gradient the forward has computed."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, relation: str, backend: str) -> Tensor:
        loss, *gradients = _fwd(student, teacher, relation, *ctx.needs_input_grad[:2], backend)
        # the features only so that a change of them or a second derivative is refused
        ctx.save_for_backward(*gradients, student, teacher)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        grads = [
            (dloss * gradient).to(ctx.dtype) if need else None
            for gradient, need in zip(ctx.saved_tensors[:2], ctx.needs_input_grad[:2], strict=True)
        ]
        return (*grads, None, None)


def _prepare(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    _checks.matrix("student", student)
    _checks.matrix("teacher", teacher)
    _checks.same_device("teacher", teacher, "student", student)
    _checks.same_leading("teacher", teacher, "student", student)
    teacher, student = _checks.same_dtype("teacher", teacher, "student", student)
    return student, teacher


def _operator_args(relation: str) -> Any:
    def operator_args(student: Tensor, teacher: Tensor) -> tuple[Any, ...]:
        student, teacher = _prepare(student, teacher)
        need = [x.requires_grad and torch.is_grad_enabled() for x in (student, teacher)]
        return student, teacher, relation, *need

    return operator_args


def _choices(student: Tensor, teacher: Tensor) -> dict[str, str]:
    sides = {"student": student, "teacher": teacher}
    asking = [name for name, x in sides.items() if x.requires_grad and torch.is_grad_enabled()]
    return {"gradient": f"in the forward, of {' and '.join(asking) or 'neither side'}"}


def _call(student: Tensor, teacher: Tensor, relation: str, backend: str) -> Tensor:
    student, teacher = _prepare(student, teacher)
    if teacher is student:  # Dynamo passes no tensor to a Function twice (torch 2.13)
        teacher = student.view_as(student)
    return RKDFunction.apply(student, teacher, relation, requested_backend(backend))


@explained_by(_operator_args("distance"), _choices)
def rkd_distance(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Difference between the distances within a batch of student and teacher features.

    With d_ij the Euclidean distance of rows i and j, and h_ij = d_ij over the mean distance of
    different rows, the mean over all B^2 pairs, a row with itself included, of

        huber(h_student - h_teacher),   huber(u) = u^2 / 2 if |u| < 1 else |u| - 1/2.

    The gradient reaches the features through the mean too, so it does not change their scale. It is
    computed with the loss, tile by tile, and the backward scales it. Rows at the same place are at
    distance 0, count in the mean and pass no gradient. Where all rows are at one place every h is
    0.

    Args:
        student: Features, [B, D_s], fp16, bf16, fp32 or fp64. Any strides.
        teacher: Features, [B, D_t], same dtype and device (under autocast the wider dtype is
            taken). Receives a gradient, at the price of a second call, only if it requires one.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar. 0 for fewer than two rows.

    Raises:
        TypeError: not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """
    return _call(student, teacher, "distance", backend)


@explained_by(_operator_args("angle"), _choices)
def rkd_angle(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Difference between the angles within a batch of student and teacher features.

    With psi_ijk the cosine of the angle at row i between rows j and k, the mean over all B^3
    triples of

        huber(psi_student - psi_teacher),   huber(u) = u^2 / 2 if |u| < 1 else |u| - 1/2.

    psi is 0 where row j or k is at the place of row i, and passes no gradient there. The B^3 angles
    come from B^2 distances, with the gradient, and are never in memory.

    Args:
        student: Features, [B, D_s], fp16, bf16, fp32 or fp64. Any strides.
        teacher: Features, [B, D_t], same dtype and device (under autocast the wider dtype is
            taken). Receives a gradient, at the price of a second call, only if it requires one.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar. 0 for fewer than two rows.

    Raises:
        TypeError: not a floating tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """
    return _call(student, teacher, "angle", backend)
