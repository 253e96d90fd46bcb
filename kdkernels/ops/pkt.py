# SPDX-License-Identifier: Apache-2.0
"""pkt: divergence of the student's similarities within a batch, as probabilities, from the
teacher's.

Traffic of one forward and backward, in elements: reads both sides once per column of tiles, writes
2 B D; the four B x B matrices stay in tiles. Derivation: docs/ops/pkt.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form, requested_backend
from kdkernels._library import define_operator
from kdkernels.ops import _rows
from kdkernels.ops._gradient_in_forward import GradientInForward
from kdkernels.ops._two_sides import check_sides, choices, fake

KERNELS = ("cosine", "student_t")
DIVERGENCES = ("kl", "jeffreys")

# Results of the forward, the same for every backend; fp64 for fp64 inputs, else fp32:
#   loss      []      sum over i, j of the divergence's terms
#   dstudent  [B, D]  its derivative by the student; empty (0) unless need_student
_fwd = define_operator(
    "pkt",
    "fwd",
    "(Tensor student, Tensor teacher, str kernel, str divergence, bool need_student, str backend) "
    "-> (Tensor loss, Tensor dstudent)",
    fake,
)


def _check(
    student: Tensor, teacher: Tensor, kernel: str, divergence: str, sample_mask: Tensor | None
) -> torch.dtype:
    """The dtype of both sides."""
    dtype = check_sides(student, teacher, sample_mask)
    _checks.choice("kernel", kernel, KERNELS)
    _checks.choice("divergence", divergence, DIVERGENCES)
    return dtype


def _operator_args(
    student: Tensor, teacher: Tensor, kernel: str, divergence: str, sample_mask: Tensor | None
) -> tuple[Any, ...]:
    dtype = _check(student, teacher, kernel, divergence, sample_mask)
    sides = form(student, dtype=dtype), form(teacher, dtype=dtype)
    return *sides, kernel, divergence, _checks.wants_gradient(student)


@explained_by(_operator_args, choices)
def pkt(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    *,
    kernel: Literal["cosine", "student_t"] = "cosine",
    divergence: Literal["kl", "jeffreys"] = "kl",
    sample_mask: Tensor | None = None,  # [B]
    backend: Backend = "auto",
) -> Tensor:
    r"""Probabilistic knowledge transfer: divergence of the similarities within a batch.

    With K the B x B similarities of the rows of one side and P_ij = K_ij / sum_j K_ij, diagonal
    included, for the student, and Q likewise for the teacher, the mean over B^2 of

        "kl"        Q_ij log((Q_ij + 1e-7) / (P_ij + 1e-7))
        "jeffreys"  (Q_ij - P_ij) (log Q_ij - log P_ij).

    No B x B matrix is formed. If the student asks for a gradient, the forward computes it.

    Args:
        student: Features, [B, D_s], fp16, bf16, fp32 or fp64. Any strides.
        teacher: Features, [B, D_t], on the same device; the wider dtype is taken where they
            differ. Detached.
        kernel: "cosine": K_ij = (<u_i, u_j> + 1) / 2 with u = x / (|x| + eps), where eps is 1e-7
            with "kl" and 1e-6 with "jeffreys", as in the two public codes. "student_t":
            K_ij = 1 / (1 + d_ij), d_ij = sqrt(|x_i - x_j|^2 + 1e-6).
        divergence: "kl", from the teacher to the student, or the symmetric "jeffreys".
        sample_mask: Which rows count, bool [B]: value and gradient are those of the batch without
            the other rows, which may hold anything and whose gradient is 0. Their number is read
            once, for which a GPU is waited for, and `torch.compile(fullgraph=True)` refuses it.
            None: all rows.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar; 0 for an empty batch.

    Raises:
        TypeError: not a floating tensor, or a mask that is not bool.
        ValueError: shapes, devices or options do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer,
        ECCV 2018, arXiv:1803.10837 ("cosine", "kl"); Passalis, Tzelepi and Tefas, Heterogeneous
        Knowledge Distillation Using Information Flow Modeling, CVPR 2020, arXiv:2005.00727
        ("student_t", "jeffreys").
    """
    dtype = _check(student, teacher, kernel, divergence, sample_mask)
    student, teacher = _rows.take(_rows.counting(sample_mask), student, teacher)
    student, teacher = _checks.in_dtype(dtype, student, teacher.detach())
    scale = 1.0 / max(student.shape[0] ** 2, 1)
    return GradientInForward.apply(
        _fwd, 1, scale, student, teacher, kernel, divergence, _checks.wants_gradient(student),
        requested_backend(backend),
    )  # fmt: skip
