# SPDX-License-Identifier: Apache-2.0
"""Noise contrastive estimation as in contrastive representation distillation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._similarity import NOISE_EPS
from kdkernels.reference._sampled_similarity import sampled_similarity


def noise_contrastive(
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, 1 + m]; the place of the row itself first
    partition: Tensor | None = None,  # Z; None: set by these scores
    *,
    temperature: float = 0.07,
) -> Tensor:
    """The definition, by exponentials, differentiable by autograd."""
    N, m = len(bank), indices.shape[1] - 1
    o = torch.exp(sampled_similarity(x, bank, indices) / temperature)
    o = o / (o.detach().mean() * N if partition is None else partition)
    c = m / N
    first = torch.log(o[:, 0] / (o[:, 0] + c + NOISE_EPS))
    others = torch.log(c / (o[:, 1:] + c + NOISE_EPS))
    return -(first.sum() + others.sum()) / len(x)
