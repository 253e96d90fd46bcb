# SPDX-License-Identifier: Apache-2.0
"""Correlation congruence (Peng et al., 2019) and the two other losses that go by its name."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._arguments import Features
from kdkernels.ops import _rows
from kdkernels.ops.gram_mse import MAX_ORDER, gram_mse

_WEIGHTS = {"paper": 0.003, "torchdistill": 0.003, "repdistiller": 0.02}


class CorrelationCongruenceLoss(nn.Module):
    r"""Correlation congruence: the kernel matrices of the batch shall agree. Three losses go by
    this name.

    - `preset="paper"`: with unit features, k(x, y) = exp(-2 gamma) sum_{p=0..order} (2 gamma <x,
      y>)^p / p!, the Taylor series of a Gaussian kernel, and (1 / B^2) ||k(S, S) - k(T, T)||_F^2,
      diagonal included. This is what AberHu's Knowledge-Distillation-Zoo computes; of the three it
      is closest to our understanding of the paper (unverified: full text not consulted). Weight
      0.003, no parameters.
    - `preset="torchdistill"`: the same polynomial of features that are not normalised, taken after
      a trained linear layer on each side, and the Frobenius norm not squared: (1 / B^2) ||k(S, S) -
      k(T, T)||_F. Weight 0.003. As the features have no unit norm, the polynomial approximates no
      Gaussian. At equality the gradient is defined as 0.
    - `preset="repdistiller"`: not about kernel matrices at all. With delta_i = |E_s(s_i) -
      E_t(t_i)|, E a trained linear layer on each side, the mean over i = 0 ... B - 2 of <delta_i,
      delta_{i+1}>, 0 for fewer than two samples. Weight 0.02. It depends on the order of the
      samples in the batch.

    Warning:
        The linear layers of the last two are trained on the teacher's side too, so both sides can
        agree by shrinking to a constant. Give the parameters of this module to the optimiser.

    Args:
        weight: Factor of the loss; None takes that of the preset.
        preset: "paper", "torchdistill" or "repdistiller", see above.
        student_dim, teacher_dim: Widths of the flattened features; needed by, and only allowed
            with, the presets that have linear layers.
        feature_dim: Output width of the linear layers; None is 128. Only with the presets that have
            them.
        gamma, order: Of the polynomial ("paper" and "torchdistill"); None is 0.4 and 2.
        backend: See `kdkernels.explain`; "repdistiller" is plain PyTorch and has no kernel to
            choose.

    Shape:
        - student: [B, ...], flattened to [B, student_dim]; for "paper" also a list, tuple or dict
          of such tensors, one per layer, whose losses are summed.
        - teacher: [B, ...], flattened to [B, teacher_dim], same B, and the same layers. Detached.
        - sample_mask: which samples count, bool [B]; the loss is that of the batch without the
          others, which may hold anything. But for "paper" their number is read, for which a GPU is
          waited for, and `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for fp64 features).

    Attributes:
        embed_student, embed_teacher: The linear layers, or None.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, arXiv:1904.01802.
    """

    def __init__(
        self,
        weight: float | None = None,
        preset: Literal["paper", "torchdistill", "repdistiller"] = "paper",
        *,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        feature_dim: int | None = None,
        gamma: float | None = None,
        order: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("preset", preset, tuple(_WEIGHTS))
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.preset = preset
        self.weight = _arguments.weight(_WEIGHTS[preset] if weight is None else weight)
        self.backend = backend
        if preset == "repdistiller":
            _refuse(preset, "has no polynomial", gamma=gamma, order=order)
        self.gamma = _checks.positive("gamma", 0.4 if gamma is None else gamma)
        self.order = _checks.count("order", 2 if order is None else order, 1, MAX_ORDER)
        self.embed_student: nn.Linear | None = None
        self.embed_teacher: nn.Linear | None = None
        if preset == "paper":
            dims = {
                "student_dim": student_dim,
                "teacher_dim": teacher_dim,
                "feature_dim": feature_dim,
            }
            _refuse(preset, "has no linear layers", **dims)
            return
        width = _width("feature_dim", 128 if feature_dim is None else feature_dim, preset)
        self.embed_student = nn.Linear(_width("student_dim", student_dim, preset), width)
        self.embed_teacher = nn.Linear(_width("teacher_dim", teacher_dim, preset), width)

    def forward(
        self,
        student: Features,
        teacher: Features,
        *,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        layers = _arguments.pairs(student, teacher)
        if self.embed_student is not None and len(layers) > 1:
            raise ValueError(
                f"student must be one layer with preset={self.preset!r}, which trains a linear "
                f"layer for it: take a module per layer, got {len(layers)}"
            )
        losses = [self._of_rows(*_arguments.flat_pair(*pair), sample_mask) for pair in layers]
        return self.weight * sum(losses[1:], losses[0])

    def _of_rows(
        self,
        s: Tensor,  # [B, D_s]
        t: Tensor,  # [B, D_t]
        sample_mask: Tensor | None,  # [B]
    ) -> Tensor:
        if self.preset != "paper":  # a linear layer multiplies what rows hold with gradients of 0
            s, t = _rows.select(sample_mask, student=s, teacher=t)
        if self.embed_student is not None and self.embed_teacher is not None:
            s, t = (
                _embed("student", self.embed_student, s),
                _embed("teacher", self.embed_teacher, t),
            )
        if self.preset == "repdistiller":
            return _neighbour_products(s, t)
        polynomial: dict[str, Any] = {
            "kernel": "rbf_taylor",
            "gamma": self.gamma,
            "order": self.order,
            "backend": self.backend,
        }
        if self.preset == "paper":
            return gram_mse(s, t, normalize="feature", sample_mask=sample_mask, **polynomial)
        squares = gram_mse(s, t, normalize="none", reduction="sum", **polynomial)
        return _root(squares) / max(s.shape[0] ** 2, 1)

    def extra_repr(self) -> str:
        text = f"weight={self.weight:g}, preset={self.preset!r}"
        if self.preset != "repdistiller":
            text += f", gamma={self.gamma:g}, order={self.order}"
        return f"{text}, backend={self.backend!r}"


def _refuse(preset: str, why: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name} must be left out with preset={preset!r}, which {why}, got {value!r}"
            )


def _width(name: str, value: Any, preset: str) -> int:
    if value is None:
        raise ValueError(f"{name} must be given with preset={preset!r}, got None")
    return _checks.count(name, value, 1, 2**31 - 1)


def _embed(
    name: str,
    linear: nn.Linear,
    x: Tensor,  # [B, D]
) -> Tensor:  # [B, feature_dim]
    if x.shape[1] != linear.in_features:
        expected = f"{linear.in_features} features per sample ({name}_dim)"
        raise ValueError(f"{name} must have {expected}, got {x.shape[1]}")
    return _arguments.embedded(linear, x)


def _neighbour_products(
    s: Tensor,  # [B, feature_dim]
    t: Tensor,  # [B, feature_dim]
) -> Tensor:
    delta = (s - t).abs().to(_checks.accumulation_dtype(s.dtype))
    return (delta[:-1] * delta[1:]).sum() / max(delta.shape[0] - 1, 1)


def _root(squares: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0; NaN stays NaN."""
    zero = squares == 0
    return torch.where(zero, 1.0, squares).sqrt().masked_fill(zero, 0.0)
