# SPDX-License-Identifier: Apache-2.0
"""Relational knowledge distillation (Park et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels._similarity import unit
from kdkernels.nn import _arguments
from kdkernels.nn._arguments import Features
from kdkernels.ops import _rows
from kdkernels.ops.rkd import rkd_angle, rkd_distance


@dataclass(frozen=True)
class _Preset:
    distance_weight: float
    angle_weight: float
    unit: tuple[bool, bool]  # whether the rows of student, teacher are normalised first


_PRESETS = {
    "repdistiller": _Preset(25.0, 50.0, (False, False)),
    "lenscloth": _Preset(1.0, 2.0, (False, True)),
    "torchdistill": _Preset(1.0, 2.0, (False, False)),
    "mmrazor": _Preset(25.0, 50.0, (True, True)),
}


class RKDLoss(nn.Module):
    r"""Relational distillation: the distances and angles within a batch are those of the teacher.

    With S [B, D_s] and T [B, D_t] the flattened features of a layer pair,

        distance_weight * rkd_distance(S, T) + angle_weight * rkd_angle(S, T),

    summed over the layer pairs; see `kdkernels.rkd_distance` and `kdkernels.rkd_angle`. Both
    divide by all pairs and triples of the batch, those with a row twice included.

    Who computes what:

    - `preset="repdistiller"`: weights 25 and 50, features as they are. RepDistiller and mdistiller
      do this.
    - `preset="lenscloth"`: weights 1 and 2, the teacher's rows divided by their norms and the
      student's not: the metric learning of the authors' repository, at batches of 128. Distances
      are relative to their mean, so this is no matter of scale: it moves the teacher's rows to a
      sphere.
    - `preset="torchdistill"`: weights 1 and 2, features as they are; its sample configurations.
    - `preset="mmrazor"`: weights 25 and 50, rows of both sides divided by their norms, as its
      `with_l2_norm=True` does by default.

    Usual place: one pair, the pooled features before the classifier, or the embeddings.

    Warning:
        The loss depends on the batch of the device that computes it: under data parallelism it is
        not that of the gathered batch. Angles cost B^3 operations: at large batch a weight of 0
        leaves them out.

    Args:
        distance_weight, angle_weight: Factors of the two terms; None takes that of the preset. A
            term of weight 0 is not computed.
        preset: "repdistiller", "lenscloth", "torchdistill" or "mmrazor", see above.
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
        TypeError, ValueError: an argument does not fit, by name; from `forward` too. Both weights
            may not be 0.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.RKDLoss()
        >>> loss = F.cross_entropy(logits, labels) + criterion(student_pooled, teacher_pooled)

    Reference:
        Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068.
    """

    def __init__(
        self,
        distance_weight: float | None = None,
        angle_weight: float | None = None,
        preset: Literal["repdistiller", "lenscloth", "torchdistill", "mmrazor"] = "repdistiller",
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("preset", preset, tuple(_PRESETS))
        requested_backend(backend)  # an unknown name raises here, not in the first step
        chosen = _PRESETS[preset]
        self.preset = preset
        self.distance_weight = _checks.not_negative(
            "distance_weight",
            chosen.distance_weight if distance_weight is None else distance_weight,
        )
        self.angle_weight = _checks.not_negative(
            "angle_weight", chosen.angle_weight if angle_weight is None else angle_weight
        )
        if self.distance_weight == self.angle_weight == 0:
            raise ValueError("angle_weight must be above 0 where distance_weight is 0, got 0")
        self.backend = backend

    def forward(
        self,
        student: Features,
        teacher: Features,
        *,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        losses = []
        for pair in _arguments.pairs(student, teacher):
            s, t = _arguments.flat_pair(*pair)
            s, t = _rows.select(sample_mask, student=s, teacher=t)
            sides = zip((s, t), _PRESETS[self.preset].unit, strict=True)
            s, t = (unit(x) if divide else x for x, divide in sides)
            for function, weight in (
                (rkd_distance, self.distance_weight),
                (rkd_angle, self.angle_weight),
            ):
                if weight > 0:
                    losses.append(weight * function(s, t, backend=self.backend))
        return sum(losses[1:], losses[0])

    def extra_repr(self) -> str:
        weights = f"distance_weight={self.distance_weight:g}, angle_weight={self.angle_weight:g}"
        return f"{weights}, preset={self.preset!r}, backend={self.backend!r}"
