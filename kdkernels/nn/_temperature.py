# SPDX-License-Identifier: Apache-2.0
"""A temperature that is trained: its logarithm, one element, with a bound below."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Bounded(torch.autograd.Function):
    """exp(log), not below `low`; there only a gradient that leads up again comes back."""

    @staticmethod
    def forward(log: Tensor, low: float) -> Tensor:
        return log.exp().clamp_min(low)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.low = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (temperature,) = ctx.saved_tensors
        # at the bound a positive derivative asks for less; NaN stays one
        lower = (temperature <= ctx.low) & (dout > 0)
        return (dout * temperature).masked_fill(lower, 0.0), None


def parameter(temperature: float) -> nn.Parameter:  # [1]
    """Its logarithm, of one dimension since `fully_shard` takes no parameter without."""
    return nn.Parameter(torch.tensor([math.log(temperature)]))


def of(log: Tensor, low: float) -> Tensor:  # [1], [1]
    return _Bounded.apply(log, low) if low > 0 else log.exp()


def with_dimension(state: dict[str, Any], key: str) -> None:
    """What was saved when the parameter had no dimension fits again."""
    if isinstance(state.get(key), Tensor) and state[key].dim() == 0:
        state[key] = state[key].reshape(1)
