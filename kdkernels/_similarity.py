# SPDX-License-Identifier: Apache-2.0
"""What the public functions and their samples share about similarities of rows."""

from __future__ import annotations

import torch
from torch import Tensor

NORM_EPS = 1e-12  # norms are clamped at it, as F.normalize does by default
NOISE_EPS = 1e-7  # added to the probabilities of noise contrastive estimation


def no_infinity(x: Tensor) -> Tensor:
    """NaN in place of infinity, for a divisor: a finite number over infinity would be zero."""
    return x.nan_to_num(nan=torch.nan, posinf=torch.nan)


def norms(x: Tensor, keepdim: bool = False) -> Tensor:
    """Norms of rows, NaN where the sum of squares overflows."""
    return no_infinity(torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim))


def unit(x: Tensor) -> Tensor:
    """Rows divided by their norm, clamped at NORM_EPS: `F.normalize`, but NaN for a row whose norm
    overflows."""
    return x / norms(x, keepdim=True).clamp_min(NORM_EPS)


def unit_gradient(
    x: Tensor,  # [..., D]
    du: Tensor,  # [..., D]
) -> Tensor:
    """The gradient of rows from that of `unit` of them, in the dtype of the latter.

    In fp64, since the radial part that is taken away can be much larger than what remains.
    """
    norm = norms(x.to(du.dtype), keepdim=True).double()
    radial = (x * du.double()).sum(-1, keepdim=True) / norm.square().clamp_min(NORM_EPS**2)
    radial = radial.masked_fill(norm < NORM_EPS, 0.0)  # a clamped norm does not depend on x
    return ((du - x * radial) / norm.clamp_min(NORM_EPS)).to(du.dtype)


def similarities(
    x: Tensor,  # [..., B, D]
    keys: Tensor,  # [..., K, D]
    normalize: bool,
) -> Tensor:  # [..., B, K]
    """Inner products, or cosines."""
    if normalize:
        x, keys = unit(x), unit(keys)
    return x @ keys.mT
