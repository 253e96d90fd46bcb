# SPDX-License-Identifier: Apache-2.0
"""What the public functions and their samples share about similarities of rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # norms are clamped at it, as F.normalize does by default
NOISE_EPS = 1e-7  # added to the probabilities of noise contrastive estimation


def similarities(
    x: Tensor,  # [..., B, D]
    keys: Tensor,  # [..., K, D]
    normalize: bool,
) -> Tensor:  # [..., B, K]
    """Inner products, or cosines."""
    if normalize:
        x, keys = (F.normalize(z, dim=-1, eps=NORM_EPS) for z in (x, keys))
    return x @ keys.mT
