# SPDX-License-Identifier: Apache-2.0
"""Inputs that can be written down, on which published codes were run, and when two fp64 numbers
are the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.testing import numerics

# For torch.testing.assert_close on two fp64 numbers computed in two ways.
FP64 = {"rtol": numerics.FP64_AGREEMENT, "atol": 0.0}


def waves(B: int, D: int, a: float, b: float, c: float) -> Tensor:  # [B, D]
    """A matrix that can be written down: sin(a i + b d + c) + 0.3 cos(0.05 i d + c)."""
    i, d = torch.arange(B, dtype=torch.float64)[:, None], torch.arange(D, dtype=torch.float64)
    return torch.sin(a * i + b * d + c) + 0.3 * torch.cos(0.05 * i * d + c)


STUDENT, TEACHER = waves(8, 16, 0.9, 0.31, 0.5), waves(8, 16, 0.7, 0.23, 0.1)
WIDE_TEACHER = waves(8, 24, 0.7, 0.23, 0.1)
QUEUE = F.normalize(waves(32, 16, 0.41, 0.19, 0.7))
HASH_WEIGHT = waves(32, 16, 0.53, 0.77, 0.2)
HASH_BIAS = 0.05 * torch.sin(torch.arange(32, dtype=torch.float64))


def assert_same(out: Tensor, wanted: Tensor, least: float = 0.0) -> None:
    """Of fp64 tensors, relative to the largest element of `wanted`, or to `least` where that is
    larger."""
    floor = max(least, torch.finfo(torch.float64).tiny)
    size = wanted.detach().abs().max().clamp_min(floor) if wanted.numel() else 1.0
    torch.testing.assert_close(out / size, wanted / size, rtol=0, atol=numerics.FP64_AGREEMENT)
