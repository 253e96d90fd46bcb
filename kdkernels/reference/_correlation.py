# SPDX-License-Identifier: Apache-2.0
"""Correlation of softened predictions, in plain PyTorch.

`correlation` is the definition. `correlation_fwd` is the operator in closed form, as derived in
docs/ops/correlation.md, whose names it keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.reference._definition import counting, definition
from kdkernels.reference._rows import norms


@definition
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
) -> Tensor:
    """The loss, differentiable by autograd; the teacher is detached."""
    student, teacher = counting(sample_mask, student, teacher)
    if student.numel() == 0:
        return student.sum()
    a, b = (torch.softmax(x / temperature, 1) for x in (student, teacher.detach()))

    def rho(dim: int) -> Tensor:
        x, y = (v - v.mean(dim, keepdim=True) if centered else v for v in (a, b))
        return (x * y).sum(dim) / (norms(x, dim=dim) * norms(y, dim=dim) + eps)

    rows, columns = (1 - rho(1)).mean(), (1 - rho(0)).mean()
    return temperature**2 * (row_weight * rows + column_weight * columns)


def correlation_fwd(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    temperature: float,
    row_weight: float,
    column_weight: float,
    centered: bool,
    eps: float,
    need_student: bool,
) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    B, C = student.shape
    if student.numel() == 0:
        empty = student.new_zeros((B, C) if need_student else (0,), dtype=acc)
        return empty.new_zeros(()), empty
    y, t = (torch.softmax(x.to(acc) / temperature, 1) for x in (student, teacher))
    loss, dy = 0.0, 0.0
    for dim, weight in ((1, row_weight / B), (0, column_weight / C)):
        a, b = (_centred(x, dim) if centered else x for x in (y, t))
        norm_a, norm_b = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (a, b))
        den = norm_a * norm_b + eps
        rho = (a * b).sum(dim, keepdim=True) / den
        loss = loss + weight * (1 - rho).sum()
        # where a is 0, so is a: any number would do in place of its norm
        radial = rho * norm_b / (torch.where(norm_a > 0, norm_a, 1.0) * den)
        dy = dy + weight * (a * radial - b / den)
    if not need_student:
        return temperature**2 * loss, y.new_empty(0)
    dz = y * (dy - (dy * y).sum(1, keepdim=True))
    return temperature**2 * loss, temperature * dz


def _centred(x: Tensor, dim: int) -> Tensor:
    """Less its mean, and exactly 0 where all are equal."""
    x = x - x.narrow(dim, 0, 1)
    return x - x.mean(dim, keepdim=True)
