# SPDX-License-Identifier: Apache-2.0
"""Correlation distances of values and of ranks: R2KD, and what is known of CMKD."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels._similarity import no_infinity, norms
from kdkernels.nn import _arguments
from kdkernels.nn._arguments import Features
from kdkernels.ops import _rows
from kdkernels.ops.correlation import correlation

RANKS = ("none", "hard", "soft")
_EPS = 1e-8  # added to the product of norms, as for values


@dataclass(frozen=True)
class _Preset:
    value_weight: float
    rank_weight: float
    temperature: float
    centered: bool
    rank: str


_PRESETS = {
    "r2kd": _Preset(2.0, 2.0, 4.0, False, "hard"),
    "cmkd": _Preset(1.0, 1.0, 1.0, True, "soft"),
}


class CorrelationDistanceLoss(nn.Module):
    r"""Correlation of the predictions' values, and of their ranks within each sample.

        value_weight * kdkernels.correlation(student, teacher, ...)
            + rank_weight * mean_i (1 - rho(ranks of row i, teacher's ranks of row i)),

    rho being Pearson's correlation, that of ranks Spearman's. The second term has no factor
    temperature^2.

    - `preset="r2kd"`: the authors' code. Values by their uncentred cosine, temperature 4, both
      weights 2. **Its rank term has no gradient**: ranks come from two argsorts (rank="hard"). It
      shifts the value that is printed and trains nothing. The authors mix the logits of a teacher
      and of its pruned copy, and repeat the term on an augmented view: both are left to the caller.
    - `preset="cmkd"`: Pearson and Spearman, after the abstract; no code is public. That
      paper seems to weigh the two by the entropy of the teacher's output (unverified: full text
      not consulted). Temperature 1 and constant weights of 1 are ours, as is everything that turns
      ranks into a loss here.

    Args:
        preset: "r2kd" or "cmkd", see above.
        value_weight, rank_weight: Not negative; None takes those of the preset.
        temperature: Positive; None takes that of the preset.
        rank: "none"; "hard", without a gradient, equal logits in any order; or "soft", the
            differentiable ranks of `torchsort` (Blondel et al. 2020) with an l2 regularisation, of
            logits / temperature. None takes that of the preset.
        regularization_strength: Of "soft", positive: the larger, the more ranks are drawn together.
        backend: Of the values' correlation; see `kdkernels.explain`.

    Shape:
        - student: logits, [B, C], or maps, [B, C, H, W], each pixel of which is a row; or a list,
          tuple or dict of such tensors, one per head, whose losses are summed.
        - teacher: the same heads, of the same shapes. Detached.
        - sample_mask: which rows count, bool [B], or [B, H, W] for maps; the loss is that of these
          rows alone, and the others may hold anything. Their number is read, for which a GPU is
          waited for, and `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        ImportError: rank="soft" without torchsort; on construction.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        R2KD: Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network
        Pruning, TKDE 2024. CMKD: Niu et al., arXiv:2410.06561. Soft ranks: Blondel et al., Fast
        Differentiable Sorting and Ranking, ICML 2020, arXiv:2002.08871.
    """

    def __init__(
        self,
        preset: Literal["r2kd", "cmkd"] = "r2kd",
        *,
        value_weight: float | None = None,
        rank_weight: float | None = None,
        temperature: float | None = None,
        rank: Literal["none", "hard", "soft"] | None = None,
        regularization_strength: float = 1.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("preset", preset, tuple(_PRESETS))
        chosen = _PRESETS[preset]
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.preset = preset
        self.rank = chosen.rank if rank is None else rank
        _checks.choice("rank", self.rank, RANKS)
        self.value_weight = _not_negative("value_weight", value_weight, chosen.value_weight)
        self.rank_weight = _not_negative("rank_weight", rank_weight, chosen.rank_weight)
        self.temperature = _checks.positive(
            "temperature", chosen.temperature if temperature is None else temperature
        )
        self.regularization_strength = _checks.positive(
            "regularization_strength", regularization_strength
        )
        self.backend = backend
        if self.rank == "soft":
            _soft_rank()

    def forward(
        self,
        student: Features,
        teacher: Features,
        *,
        sample_mask: Tensor | None = None,  # [B] or [B, H, W]
    ) -> Tensor:
        losses = []
        for suffix, *sides in _arguments.pairs(student, teacher):
            rows = _arguments.logit_rows(suffix, *sides)
            mask = _arguments.row_mask(sample_mask, suffix, sides[0])
            losses.append(self._of_rows(*_rows.select(mask, student=rows[0], teacher=rows[1])))
        return sum(losses[1:], losses[0])

    def _of_rows(
        self,
        student: Tensor,  # [B, C]
        teacher: Tensor,  # [B, C]
    ) -> Tensor:
        loss = self.value_weight * correlation(
            student, teacher, temperature=self.temperature, centered=_PRESETS[self.preset].centered,
            backend=self.backend,
        )  # fmt: skip
        if self.rank == "none" or student.numel() == 0:
            return loss
        ranks = (self._ranks(x.to(loss.dtype) / self.temperature) for x in (student, teacher))
        return loss + self.rank_weight * (1 - _pearson(next(ranks), next(ranks).detach())).mean()

    def _ranks(self, x: Tensor) -> Tensor:  # [B, C]
        if self.rank == "soft":
            return _soft_rank()(x, regularization_strength=self.regularization_strength)
        order = x.argsort(1).argsort(1).to(x.dtype) + 1
        return torch.where(x.isnan().any(1, keepdim=True), torch.nan, order)

    def extra_repr(self) -> str:
        text = (
            f"preset={self.preset!r}, value_weight={self.value_weight:g}, "
            f"rank_weight={self.rank_weight:g}, temperature={self.temperature:g}, "
            f"rank={self.rank!r}"
        )
        if self.rank == "soft":
            text += f", regularization_strength={self.regularization_strength:g}"
        return f"{text}, backend={self.backend!r}"


def _not_negative(name: str, value: Any, default: float) -> float:
    return _checks.not_negative(name, default if value is None else value)


def _soft_rank() -> Callable[..., Tensor]:
    try:
        return importlib.import_module("torchsort").soft_rank
    except ImportError as error:
        raise ImportError(
            "rank='soft' needs torchsort, which is built against the installed torch: "
            "pip install --no-build-isolation torchsort"
        ) from error


def _pearson(
    a: Tensor,  # [B, C]
    b: Tensor,  # [B, C]
) -> Tensor:  # [B]
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    size = no_infinity(norms(a) * norms(b))
    return (a * b).sum(1) / (size + _EPS)
