# SPDX-License-Identifier: Apache-2.0
"""Probabilistic knowledge transfer (Passalis and Tefas, 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._arguments import Features
from kdkernels.ops import _rows
from kdkernels.ops.pkt import pkt


@dataclass(frozen=True)
class _Preset:
    weight: float
    kernels: tuple[Literal["cosine", "student_t"], ...]  # their divergences are added
    divergence: Literal["kl", "jeffreys"]


_PRESETS = {
    "repdistiller": _Preset(30000.0, ("cosine",), "kl"),
    "information_flow": _Preset(1.0, ("cosine", "student_t"), "jeffreys"),
}


class PKTLoss(nn.Module):
    r"""Probabilistic knowledge transfer: the same neighbours with the same probabilities.

    With P and Q the similarities within the batch of student and teacher, each row divided by its
    sum, `weight` times the mean over B^2 of a divergence of P from Q (`kdkernels.pkt`), summed over
    the layer pairs.

    Who computes what:

    - `preset="repdistiller"`: KL divergence of cosine similarities, weight 30000, in RepDistiller,
      mdistiller and torchdistill; the function is that of the authors' code (probabilistic_kt).
      The mean is over B^2, not over rows, hence the weight. Code sums over j = i too; the paper's
      conditional probability does not (unverified: full text not consulted).
    - `preset="information_flow"`: the authors' later code (pkth), kernel and divergence "combined":
      the Jeffreys divergences of cosine similarities and of Student-t ones, added, weight 1. There
      it is summed over four layers, the first three with a weight that starts at 100 and decays by
      0.7 an epoch: weigh the layers outside, one module each, for that.

    Args:
        weight: Factor of the loss; None takes that of the preset.
        preset: "repdistiller" or "information_flow", see above.
        backend: See `kdkernels.explain`.

    Shape:
        - student: [B, ...], or a list, tuple or dict of such tensors, one per layer.
        - teacher: the same number of layers, or keys of a dict, with the same B; other dimensions
          are free. Detached.
        - sample_mask: which samples count, bool [B]; the loss is that of the batch without the
          others, which may hold anything. Their number is read, for which a GPU is waited for, and
          `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for fp64 features).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer,
        ECCV 2018, arXiv:1803.10837; Passalis, Tzelepi and Tefas, Heterogeneous Knowledge
        Distillation Using Information Flow Modeling, CVPR 2020, arXiv:2005.00727.
    """

    def __init__(
        self,
        weight: float | None = None,
        preset: Literal["repdistiller", "information_flow"] = "repdistiller",
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("preset", preset, tuple(_PRESETS))
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.preset = preset
        self.weight = _arguments.weight(_PRESETS[preset].weight if weight is None else weight)
        self.backend = backend

    def forward(
        self,
        student: Features,
        teacher: Features,
        *,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        chosen = _PRESETS[self.preset]
        options: dict[str, Any] = {"divergence": chosen.divergence, "backend": self.backend}
        losses = []
        for pair in _arguments.pairs(student, teacher):
            s, t = _arguments.flat_pair(*pair)
            s, t = _rows.select(sample_mask, student=s, teacher=t)
            losses += [pkt(s, t, kernel=kernel, **options) for kernel in chosen.kernels]
        return self.weight * sum(losses[1:], losses[0])

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, preset={self.preset!r}, backend={self.backend!r}"
