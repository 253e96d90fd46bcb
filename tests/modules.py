# SPDX-License-Identifier: Apache-2.0
"""What the tests of several modules share: inputs, formulas with plain loops, comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdkernels as kd


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def similarity_preserving(student: Tensor, teacher: Tensor, p: int) -> Tensor:
    """Entry by entry, with plain loops."""
    B, total = len(student), torch.zeros((), dtype=torch.float64)
    for i in range(B):
        rows = [
            torch.stack([torch.dot(x[i].flatten(), x[j].flatten()) for j in range(B)])
            for x in (student, teacher)
        ]
        rows = [row / row.abs().pow(p).sum().pow(1 / p) for row in rows]
        total = total + (rows[0] - rows[1]).pow(2).sum()
    return total / B**2


def unit(x: Tensor) -> Tensor:
    """Rows of norm 1."""
    return x / x.pow(2).sum(1, keepdim=True).sqrt()


def pair_loss(x: Tensor, r: Tensor, same: bool, margin: float) -> Tensor:
    """The contrastive loss of one pair of rows."""
    d = (x - r).norm()
    return (d if same else (margin - d).clamp_min(0)).square() / 2


def congruence(preset: str, **options: Any) -> nn.Module:
    dims = {} if preset == "paper" else {"student_dim": 12, "teacher_dim": 20, "feature_dim": 6}
    return kd.nn.CorrelationCongruenceLoss(preset=preset, **{**dims, **options}).double()


def assert_same_loss(loss: Tensor, expected: Tensor, *sources: Tensor) -> None:
    """Values, and gradients of the sources."""
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(of, sources, retain_graph=True) for of in (loss, expected)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
