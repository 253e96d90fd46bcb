# SPDX-License-Identifier: Apache-2.0
"""Similarity-preserving knowledge distillation (Tung and Mori, 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._arguments import Features
from kdkernels.ops.gram_mse import ALGORITHMS, choose_algorithm, gram_mse


@dataclass(frozen=True)
class _Preset:
    normalize: Literal["row_l2", "row_l1"]
    weight: float


_PRESETS = {"paper": _Preset("row_l2", 3000.0), "torchdistill": _Preset("row_l1", 1.0)}


class SimilarityPreservingLoss(nn.Module):
    r"""Similarity-preserving distillation: student and teacher find the same samples similar.

    With S [B, D_s] and T [B, D_t] the flattened features of a layer pair, and the rows of S S^T and
    T T^T normalised,

        weight * (1 / B^2) ||norm(S S^T) - norm(T T^T)||_F^2,

    diagonal included, summed over the layer pairs. The rows are normalised after the product;
    normalising the features first is another loss (`kd.gram_mse(..., normalize="feature")`).

    Who computes what:

    - `preset="paper"`: rows of unit L2 norm, weight 3000. RepDistiller (whose comment says that the
      author checked it) and mdistiller do this.
    - `preset="torchdistill"`: rows of unit L1 norm, as `SPKDLoss` of torchdistill does, with the
      weight 1 of its sample configuration. The value is several times smaller, so a weight does not
      carry over from one preset to the other.

    Usual place: one pair, the last convolutional map after its ReLU and before pooling.

    Warning:
        The loss depends on the batch of the device that computes it: rows of the Gram hold
        similarities within that batch only, and as they have unit norm the "paper" value before
        weighting is at most 4 / B (2 / B for features that are not negative). Under data
        parallelism it is neither that of the gathered batch nor does averaging over devices make it
        so; and a weight tuned at one batch size per device means something else at another.

    Args:
        weight: Factor of the loss; None takes that of the preset.
        preset: "paper" or "torchdistill", see above.
        algorithm: "auto", "tiled" or "factored", as in `kdkernels.gram_mse` ("factored" not for
            "torchdistill").
        backend: See `kdkernels.explain`.

    Shape:
        - student: [B, ...], or a list, tuple or dict of such tensors, one per layer.
        - teacher: the same number of layers, or keys of a dict, with the same B; other dimensions
          are free. Detached.
        - sample_mask: which samples count, bool [B]; the loss is that of the batch without the
          others, which may hold anything. None: all.
        - output: scalar, fp32 (fp64 for fp64 features).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.SimilarityPreservingLoss()
        >>> loss = F.cross_entropy(logits, labels) + criterion(student_map, teacher_map)

    Reference:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682.
    """

    def __init__(
        self,
        weight: float | None = None,
        preset: Literal["paper", "torchdistill"] = "paper",
        *,
        algorithm: Literal["auto", "tiled", "factored"] = "auto",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("preset", preset, tuple(_PRESETS))
        _checks.choice("algorithm", algorithm, ALGORITHMS)
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.preset = preset
        self.normalize = _PRESETS[preset].normalize
        self.weight = _arguments.weight(_PRESETS[preset].weight if weight is None else weight)
        self.algorithm = algorithm
        self.backend = backend
        choose_algorithm(1, 1, 1, normalize=self.normalize, kernel="linear", algorithm=algorithm)

    def forward(
        self,
        student: Features,
        teacher: Features,
        *,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        losses = [
            gram_mse(
                *_arguments.flat_pair(*pair),
                normalize=self.normalize,
                algorithm=self.algorithm,
                sample_mask=sample_mask,
                backend=self.backend,
            )
            for pair in _arguments.pairs(student, teacher)
        ]
        return self.weight * sum(losses[1:], losses[0])

    def extra_repr(self) -> str:
        choices = f"algorithm={self.algorithm!r}, backend={self.backend!r}"
        return f"weight={self.weight:g}, preset={self.preset!r}, {choices}"
