# SPDX-License-Identifier: Apache-2.0
"""Inputs that can be written down, on which published codes were run, and when two fp64 numbers
are the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.testing import numerics


def waves(B: int, D: int, a: float, b: float, c: float) -> Tensor:  # [B, D]
    """A matrix that can be written down: sin(a i + b d + c) + 0.3 cos(0.05 i d + c)."""
    i, d = torch.arange(B, dtype=torch.float64)[:, None], torch.arange(D, dtype=torch.float64)
    return torch.sin(a * i + b * d + c) + 0.3 * torch.cos(0.05 * i * d + c)


STUDENT, TEACHER = waves(8, 16, 0.9, 0.31, 0.5), waves(8, 16, 0.7, 0.23, 0.1)
WIDE_TEACHER = waves(8, 24, 0.7, 0.23, 0.1)
QUEUE = F.normalize(waves(32, 16, 0.41, 0.19, 0.7))
# directions and offsets of hyperplanes
WEIGHT = waves(32, 16, 0.53, 0.77, 0.2)
BIAS = 0.05 * torch.sin(torch.arange(32, dtype=torch.float64))


def assert_same(
    out: Tensor,
    wanted: Tensor,
    *,
    size: float | Tensor | None = None,
    least: float = 0.0,
    lost: float = 1.0,
) -> None:
    """That two ways lead to one fp64 tensor, relative to `size`: by default the largest element of
    `wanted`, or `least` where that is larger. `lost` is the condition of the problem, the factor by
    which it enlarges the rounding of its input."""
    if size is None:
        floor = max(least, torch.finfo(torch.float64).tiny)
        size = wanted.detach().abs().max().clamp_min(floor) if wanted.numel() else 1.0
    atol = lost * numerics.FP64_AGREEMENT
    torch.testing.assert_close(out / size, wanted / size, rtol=0, atol=atol)
