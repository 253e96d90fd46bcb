# SPDX-License-Identifier: Apache-2.0
"""Intra-utterance similarity-preserving distillation (2020)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._arguments import Features
from kdkernels.ops.gram_mse import ALGORITHMS, gram_mse


class IntraUtteranceSimilarityLoss(nn.Module):
    r"""Similarity preservation between the frames of one utterance instead of the samples of a
    batch.

    With F_u [frames, features] the features of utterance u, and rows of unit L2 norm,

        weight * mean_u (1 / frames^2) ||norm(S_u S_u^T) - norm(T_u T_u^T)||_F^2,

    summed over the layer pairs. Unlike `SimilarityPreservingLoss` it does not depend on what else
    is in the batch.

    Note:
        This formula is ours, made by analogy with `SimilarityPreservingLoss`: no public code was
        found (unverified: full text not consulted). The idea (similarities between the frames of an
        utterance) is the paper's; the normalisation, the mean over utterances and the default
        weight of 1 are not taken from it.

    Args:
        weight: Factor of the loss.
        algorithm: "auto", "tiled" or "factored", as in `kdkernels.gram_mse`.
        backend: See `kdkernels.explain`.

    Shape:
        - student: [utterances, frames, D_s], or a list, tuple or dict of such tensors, one per
          layer.
        - teacher: [utterances, frames, D_t], as many layers, or the same keys of a dict. Detached.
          Where the networks differ in frame rate, pool one of them first.
        - frame_mask: which frames count, bool [utterances, frames], for utterances of different
          lengths. The value of an utterance is that of its frames that count, with their number in
          the place of `frames`; an utterance without one is left out of the mean. The other frames
          may hold anything. None: all.
        - output: scalar, fp32 (fp64 for fp64 features).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Intra-Utterance Similarity Preserving Knowledge Distillation for Audio Tagging, Interspeech
        2020, arXiv:2009.01759.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        algorithm: Literal["auto", "tiled", "factored"] = "auto",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("algorithm", algorithm, ALGORITHMS)
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.algorithm = algorithm
        self.backend = backend

    def forward(
        self,
        student: Features,
        teacher: Features,
        *,
        frame_mask: Tensor | None = None,  # [utterances, frames]
    ) -> Tensor:
        losses = []
        for suffix, s, t in _arguments.pairs(student, teacher):
            _check_frames(suffix, s, t)
            _checks.sample_mask(frame_mask, f"student{suffix}", s, name="frame_mask")
            losses.append(
                gram_mse(
                    s, t, algorithm=self.algorithm, sample_mask=frame_mask, backend=self.backend
                )
            )
        return self.weight * sum(losses[1:], losses[0])

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, algorithm={self.algorithm!r}, backend={self.backend!r}"


def _check_frames(suffix: str, student: Tensor, teacher: Tensor) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        _checks.features(name + suffix, x)
        if x.dim() != 3:
            raise ValueError(
                f"{name}{suffix} must be [utterances, frames, features], got shape {list(x.shape)}"
            )
    for axis, unit in enumerate(("utterances", "frames")):
        if student.shape[axis] != teacher.shape[axis]:
            expected = f"{student.shape[axis]} {unit} like student{suffix}"
            raise ValueError(f"teacher{suffix} must have {expected}, got {teacher.shape[axis]}")
    _checks.same_device(f"teacher{suffix}", teacher, f"student{suffix}", student)
