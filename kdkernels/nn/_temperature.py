# SPDX-License-Identifier: Apache-2.0
"""Losses with a temperature that may be trained: its logarithm, one element, with a bound below."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments


class _Bounded(torch.autograd.Function):
    """exp(log), not below `low`; there only a gradient that leads up again comes back."""

    @staticmethod
    def forward(log: Tensor, low: Tensor) -> Tensor:
        return torch.maximum(log.exp(), low)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        temperature, low = ctx.saved_tensors
        # at the bound a positive derivative asks for less; NaN stays one
        lower = (temperature <= low) & (dout > 0)
        return (dout * temperature).masked_fill(lower, 0.0), None


def _fits(state: dict[str, Any], key: str) -> None:
    """What was saved when the parameter had no dimension fits again."""
    if isinstance(state.get(key), Tensor) and state[key].dim() == 0:
        state[key] = state[key].reshape(1)


class TemperedLoss(nn.Module):
    """Cross-entropy of similarities over a temperature.

    `log_temperature` is a parameter of shape [1], since `fully_shard` takes none without a
    dimension, or None where the temperature is not learned.
    """

    def __init__(
        self,
        weight: float,
        temperature: float,
        learn_temperature: bool,
        min_temperature: float,
        normalize: bool,
        backend: Backend,
    ) -> None:
        super().__init__()
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.temperature = _checks.positive("temperature", temperature)
        self.normalize = _checks.flag("normalize", normalize)
        self.backend = backend
        self.min_temperature = _checks.not_negative("min_temperature", min_temperature)
        self.log_temperature: nn.Parameter | None = None
        if _checks.flag("learn_temperature", learn_temperature):
            if self.temperature < self.min_temperature:
                raise ValueError(
                    f"temperature must be at least min_temperature, {self.min_temperature:g}, "
                    f"where it is learned, got {self.temperature:g}"
                )
            self.log_temperature = nn.Parameter(torch.tensor([math.log(self.temperature)]))

    def _options(self) -> dict[str, Any]:
        """Of every call of `info_nce`."""
        temperature: float | Tensor = self.temperature
        if self.log_temperature is not None:
            log, low = self.log_temperature, self.min_temperature
            # a tensor, since a float would be a constant of compiled code
            bound = torch.zeros_like(log, requires_grad=False) + low
            temperature = _Bounded.apply(log, bound)
        return {
            "temperature": temperature, "normalize": self.normalize, "backend": self.backend
        }  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _fits(state_dict, f"{prefix}log_temperature")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        learned = self.log_temperature is not None
        bound = f", min_temperature={self.min_temperature:g}" if learned else ""
        return (
            f"weight={self.weight:g}, temperature={self.temperature:g}, "
            f"learn_temperature={learned}{bound}, normalize={self.normalize}, "
            f"backend={self.backend!r}"
        )
