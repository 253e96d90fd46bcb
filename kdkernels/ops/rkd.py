# SPDX-License-Identifier: Apache-2.0
"""rkd: distances and angles within a batch, the student's against the teacher's.

Everything comes from distances between rows: an angle at one of three rows is a function of their
three distances. Angles are never in memory, and distances are B x B numbers for the angles only.
Derivation: docs/ops/rkd.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form, requested_backend
from kdkernels._library import define_operator
from kdkernels.ops import _rows
from kdkernels.ops._gradient_in_forward import GradientInForward
from kdkernels.ops._two_sides import check_sides

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


def _need(student: Tensor, teacher: Tensor) -> tuple[bool, bool]:
    """The flags need_student and need_teacher."""
    return _checks.wants_gradient(student), _checks.wants_gradient(teacher)


def _operator_args(relation: str) -> Any:
    def operator_args(
        student: Tensor, teacher: Tensor, sample_mask: Tensor | None
    ) -> tuple[Any, ...]:
        dtype = check_sides(student, teacher, sample_mask)
        sides = (student, teacher)
        return *(form(x, dtype=dtype) for x in sides), relation, *_need(student, teacher)

    return operator_args


def _choices(student: Tensor, teacher: Tensor, **_: Any) -> dict[str, str]:
    sides = ("student", "teacher")
    asking = [name for name, need in zip(sides, _need(student, teacher), strict=True) if need]
    return {"gradient": f"in the forward, of {' and '.join(asking) or 'neither side'}"}


def _call(
    student: Tensor, teacher: Tensor, sample_mask: Tensor | None, relation: str, backend: str
) -> Tensor:
    dtype = check_sides(student, teacher, sample_mask)
    student, teacher = _rows.take(_rows.counting(sample_mask), student, teacher)
    student, teacher = _checks.in_dtype(dtype, student, teacher)
    if teacher is student:  # Dynamo passes no tensor to a Function twice (torch 2.13)
        teacher = student.view_as(student)
    return GradientInForward.apply(
        _fwd, 2, 1.0, student, teacher, relation, *_need(student, teacher),
        requested_backend(backend),
    )  # fmt: skip


@explained_by(_operator_args("distance"), _choices)
def rkd_distance(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    *,
    sample_mask: Tensor | None = None,  # [B]
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
        teacher: Features, [B, D_t], on the same device; the wider dtype is taken where they
            differ. Receives a gradient, at the price of a second call, only if it requires one.
        sample_mask: Which rows count, bool [B]: value and gradient are those of the batch without
            the other rows, which may hold anything and whose gradient is 0. Their number is read
            once, for which a GPU is waited for, and `torch.compile(fullgraph=True)` refuses it.
            None: all rows.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar. 0 for fewer than two rows.

    Raises:
        TypeError: not a floating tensor, or a mask that is not bool.
        ValueError: shapes or devices do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """
    return _call(student, teacher, sample_mask, "distance", backend)


@explained_by(_operator_args("angle"), _choices)
def rkd_angle(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    *,
    sample_mask: Tensor | None = None,  # [B]
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
        teacher: Features, [B, D_t], on the same device; the wider dtype is taken where they
            differ. Receives a gradient, at the price of a second call, only if it requires one.
        sample_mask: Which rows count, bool [B]: value and gradient are those of the batch without
            the other rows, which may hold anything and whose gradient is 0. Their number is read
            once, for which a GPU is waited for, and `torch.compile(fullgraph=True)` refuses it.
            None: all rows.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar. 0 for fewer than two rows.

    Raises:
        TypeError: not a floating tensor, or a mask that is not bool.
        ValueError: shapes or devices do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """
    return _call(student, teacher, sample_mask, "angle", backend)
