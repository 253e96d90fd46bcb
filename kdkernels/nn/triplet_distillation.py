# SPDX-License-Identifier: Apache-2.0
"""Triplet loss for knowledge distillation, and its variant on pairs (Oki et al., 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.ops import _rows
from kdkernels.ops.contrastive import contrastive_loss
from kdkernels.ops.triplet_distillation import NEGATIVES, triplet_distillation


class TripletDistillationLoss(nn.Module):
    """`kd.triplet_distillation`, weighted: teacher as anchor, student as positive and negative.

    The defaults are the authors': raw logits, margin 5, weight 2, random negatives. They draw
    negatives from the training set, here they come from the batch.

    There is no preset, since the two versions of the authors' code compute the same loss and differ
    in what stands beside it: cross-entropy (2020); cross-entropy and a KL term at temperature 1
    (2022).

    Args:
        weight: Factor of the loss.
        margin: Not negative; tied to the scale of the logits.
        negatives: "random", or our extensions "hardest" and "semihard".
        ignore_index: Label of samples that do not count, an integer. None: every label is a class,
            -1 too.
        backend: See `kdkernels.explain`.

    Shape:
        - student, teacher: [B, D]; the teacher is detached.
        - labels: [B], any integer dtype.
        - sample_mask: which samples count, bool [B]; the loss is that of the batch without the
          others, which may hold anything. Their number is read, for which a GPU is waited for, and
          `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Oki, Abe, Miyao and Kurita, Triplet Loss for Knowledge Distillation, IJCNN 2020,
        arXiv:2004.08116.
    """

    def __init__(
        self,
        weight: float = 2.0,
        *,
        margin: float = 5.0,
        negatives: Literal["random", "hardest", "semihard"] = "random",
        ignore_index: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("negatives", negatives, NEGATIVES)
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.margin = _checks.not_negative("margin", margin)
        self.negatives = negatives
        self.ignore_index = _checks.ignore_index(ignore_index)
        self.backend = backend

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        return self.weight * triplet_distillation(
            student,
            teacher,
            labels,
            margin=self.margin,
            negatives=self.negatives,
            sample_mask=sample_mask,
            ignore_index=self.ignore_index,
            generator=generator,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        choices = f"negatives={self.negatives!r}, ignore_index={self.ignore_index}"
        return (
            f"weight={self.weight:g}, margin={self.margin:g}, {choices}, backend={self.backend!r}"
        )


class PairDistillationLoss(nn.Module):
    """Contrastive loss between each of the student's outputs and each of the teacher's: pairs of
    one class are pulled together, pairs of two classes pushed apart up to the margin.

    The abstract of the paper names a variant of its triplet loss on pairs, which the authors' code
    does not hold (unverified: full text not consulted). This is our reading of the idea and no
    claim about theirs: d^2 / 2 or max(margin - d, 0)^2 / 2, d the distance of raw outputs, averaged
    over all B^2 pairs of a student's and a teacher's row. Pairs are by class, so a student's row is
    also pulled to the teacher's rows of other samples of its class. Margin 5 is borrowed from the
    triplet loss; weight 1 is ours.

    Args:
        weight: Factor of the loss.
        margin: Not negative; tied to the scale of the outputs.
        ignore_index: Label of samples that do not count, an integer. None: every label is a class,
            -1 too.
        backend: See `kdkernels.explain`.

    Shape:
        - student, teacher: [B, D]; the teacher is detached.
        - labels: [B], any integer dtype.
        - sample_mask: which samples count, bool [B]; the loss is that of the batch without the
          others, which may hold anything. Their number is read, for which a GPU is waited for, and
          `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Oki, Abe, Miyao and Kurita, Triplet Loss for Knowledge Distillation, IJCNN 2020,
        arXiv:2004.08116, for the idea; see `ContrastiveLoss` for the formula.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        margin: float = 5.0,
        ignore_index: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.margin = _checks.not_negative("margin", margin)
        self.ignore_index = _checks.ignore_index(ignore_index)
        self.backend = backend

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        *,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        _checks.matrix("student", student)
        _checks.matrix("teacher", teacher)
        _checks.same_device("teacher", teacher, "student", student)
        if teacher.shape != student.shape:
            expected = f"shape {list(student.shape)} like student"
            raise ValueError(f"teacher must have {expected}, got {list(teacher.shape)}")
        _checks.labels("labels", labels, "student", student)
        _checks.sample_mask(sample_mask, "student", student)
        mask = _rows.of_label(labels.to(torch.int64), sample_mask, self.ignore_index)
        student, teacher, labels = _rows.take(_rows.counting(mask), student, teacher, labels)
        return self.weight * contrastive_loss(
            student,
            labels,
            references=teacher.detach(),
            reference_labels=labels,
            margin=self.margin,
            normalize_embeddings=False,
            reduction="mean",
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight:g}, margin={self.margin:g}, ignore_index={self.ignore_index}, "
            f"backend={self.backend!r}"
        )
