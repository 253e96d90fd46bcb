# SPDX-License-Identifier: Apache-2.0
"""correlation: how far the softened predictions of student and teacher are from correlated, within
samples and within classes.

Traffic of one forward and backward, in elements: reads 4 B C, writes B C, and moments of C columns.
Derivation: docs/ops/correlation.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form, requested_backend
from kdkernels._library import define_operator
from kdkernels.ops import _rows
from kdkernels.ops._gradient_in_forward import GradientInForward
from kdkernels.ops._two_sides import check_sides, choices, fake

# Results of the forward, the same for every backend; fp64 for fp64 inputs, else fp32:
#   loss      []      as the public function returns it
#   dstudent  [B, C]  its derivative by the student; empty (0) unless need_student
_fwd = define_operator(
    "correlation",
    "fwd",
    "(Tensor student, Tensor teacher, float temperature, float row_weight, float column_weight, "
    "bool centered, float eps, bool need_student, str backend) -> (Tensor loss, Tensor dstudent)",
    fake,
)


def _check(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    row_weight: float,
    column_weight: float,
    centered: bool,
    eps: float,
    sample_mask: Tensor | None,
) -> tuple[Any, ...]:
    """The dtype of both sides, and the options as the operator takes them."""
    dtype = check_sides(student, teacher, sample_mask)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must have {student.shape[1]} columns like student, got {teacher.shape[1]}"
        )
    return (
        dtype,
        _checks.positive("temperature", temperature),
        _checks.not_negative("row_weight", row_weight),
        _checks.not_negative("column_weight", column_weight),
        _checks.flag("centered", centered),
        _checks.positive("eps", eps),
    )


def _operator_args(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Any, ...]:
    dtype, *checked = _check(student, teacher, **options)
    sides = form(student, dtype=dtype), form(teacher, dtype=dtype)
    return *sides, *checked, _checks.wants_gradient(student)


@explained_by(_operator_args, choices)
def correlation(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    *,
    temperature: float = 1.0,
    row_weight: float = 1.0,
    column_weight: float = 1.0,
    centered: bool = True,
    eps: float = 1e-8,
    sample_mask: Tensor | None = None,  # [B]
    backend: Backend = "auto",
) -> Tensor:
    r"""One minus the correlation of softened predictions, within samples and within classes.

    With Y = softmax(logits / temperature) over the classes, rho(a, b) = <a, b> / (|a| |b| + eps) of
    vectors less their means, the value is

        temperature^2 (row_weight mean_i (1 - rho(Y_i, Y'_i))
                       + column_weight mean_c (1 - rho(Y_:c, Y'_:c))).

    The defaults are the loss of DIST with the temperature of its ImageNet experiments.

    Args:
        student: Logits, [B, C], fp16, bf16, fp32 or fp64. Any strides.
        teacher: Logits, [B, C], on the same device; the wider dtype is taken where they differ.
            Detached.
        temperature: Positive.
        row_weight: Of the samples' correlations over classes, not negative.
        column_weight: Of the classes' correlations over samples, not negative.
        centered: False leaves the means in, so that rho is a cosine: the value term of R2KD, whose
            absolute value changes nothing, since probabilities are not negative.
        eps: Added to the product of the norms, positive.
        sample_mask: Which rows count, bool [B]: value and gradient are those of the batch without
            the other rows, which may hold anything and whose gradient is 0. Their number is read
            once, for which a GPU is waited for, and `torch.compile(fullgraph=True)` refuses it.
            None: all rows.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar. A row or column that does not vary has rho = 0, so a
        batch of one sample adds temperature^2 column_weight, constant. 0 for an empty batch.

    Raises:
        TypeError: not a floating tensor, or an option or a mask is of another type.
        ValueError: shapes, devices or options do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
        arXiv:2205.10536.
    """
    dtype, *options = _check(
        student, teacher, temperature, row_weight, column_weight, centered, eps, sample_mask
    )
    student, teacher = _rows.take(_rows.counting(sample_mask), student, teacher)
    student, teacher = _checks.in_dtype(dtype, student, teacher.detach())
    return GradientInForward.apply(
        _fwd, 1, 1.0, student, teacher, *options, _checks.wants_gradient(student),
        requested_backend(backend),
    )  # fmt: skip
