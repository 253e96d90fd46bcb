# SPDX-License-Identifier: Apache-2.0
"""Distillation from a stronger teacher by correlation (Huang et al., 2022)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._arguments import Features
from kdkernels.ops.correlation import correlation

_TEMPERATURES = {"imagenet": 1.0, "cifar": 4.0}


class DISTLoss(nn.Module):
    r"""DIST: correlated predictions within each sample, and of each class within the batch.

    With Y = softmax(logits / temperature) and rho Pearson's correlation,

        weight * temperature^2 (beta mean_i (1 - rho(Y_i, Y'_i))
                                + gamma mean_c (1 - rho(Y_:c, Y'_:c))),

    as in the authors' code, which adds 1e-8 to the product of the norms. torchdistill clamps there
    instead. The authors weigh the loss by 2 beside a cross-entropy of weight 1.

    - `preset="imagenet"`: temperature 1, for detection and segmentation too. For segmentation the
      authors make each pixel a row.
    - `preset="cifar"`: temperature 4.

    Args:
        weight: Factor of the loss.
        preset: "imagenet" or "cifar": the temperature, where that is None.
        beta, gamma: Of the relations within samples, and within classes.
        temperature: Positive; None takes that of the preset.
        backend: See `kdkernels.explain`.

    Shape:
        - student: logits, [B, C], or maps, [B, C, H, W], each pixel of which is a row; or a list,
          tuple or dict of such tensors, one per head, whose losses are summed. One row has no
          relations within classes: that term is constant.
        - teacher: the same heads, of the same shapes. Detached.
        - sample_mask: which rows count, bool [B], or [B, H, W] for maps; the loss is that of these
          rows alone, and the others may hold anything. Their number is read, for which a GPU is
          waited for, and `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
        arXiv:2205.10536.
    """

    def __init__(
        self,
        weight: float = 2.0,
        preset: Literal["imagenet", "cifar"] = "imagenet",
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("preset", preset, tuple(_TEMPERATURES))
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.preset = preset
        self.weight = _arguments.weight(weight)
        self.beta = _checks.not_negative("beta", beta)
        self.gamma = _checks.not_negative("gamma", gamma)
        chosen = _TEMPERATURES[preset] if temperature is None else temperature
        self.temperature = _checks.positive("temperature", chosen)
        self.backend = backend

    def forward(
        self,
        student: Features,
        teacher: Features,
        *,
        sample_mask: Tensor | None = None,  # [B] or [B, H, W]
    ) -> Tensor:
        losses = [
            correlation(
                *_arguments.logit_rows(suffix, s, t), temperature=self.temperature,
                row_weight=self.beta, column_weight=self.gamma,
                sample_mask=_arguments.row_mask(sample_mask, suffix, s), backend=self.backend,
            )
            for suffix, s, t in _arguments.pairs(student, teacher)
        ]  # fmt: skip
        return self.weight * sum(losses[1:], losses[0])

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight:g}, preset={self.preset!r}, beta={self.beta:g}, "
            f"gamma={self.gamma:g}, temperature={self.temperature:g}, backend={self.backend!r}"
        )
