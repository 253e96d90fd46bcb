# SPDX-License-Identifier: Apache-2.0
"""Rows divided by their norms."""

from __future__ import annotations

from torch import Tensor

from kdkernels._similarity import NORM_EPS, norms


def normalize_backward(
    x: Tensor,  # [..., D]
    du: Tensor,  # [..., D], the gradient of u = x / max(|x|, NORM_EPS)
) -> Tensor:
    """The gradient of x, in fp64: its radial part, which is taken away, can be much larger than
    what remains."""
    x, du = x.double(), du.double()
    norm = norms(x, keepdim=True)
    u = x / norm.clamp_min(NORM_EPS)
    return (du - u * (u * du).sum(-1, keepdim=True) * (norm >= NORM_EPS)) / norm.clamp_min(NORM_EPS)
