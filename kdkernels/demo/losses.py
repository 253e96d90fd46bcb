# SPDX-License-Identifier: Apache-2.0
"""The registry of what the demo distils with. A loss joins by one more `Entry` in `ENTRIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.demo.models import Outputs
from kdkernels.reference import gram_mse as reference


@dataclass(frozen=True)
class Widths:
    """Of the flattened features; for losses with projections."""

    student: int
    teacher: int


@dataclass(frozen=True)
class Entry:
    """One way to train the student: weighted cross-entropy plus a criterion."""

    name: str  # for --losses
    label: str  # for tables and plots
    # Makes the criterion, a module of (student, teacher, labels) whose parameters are trained with
    # the student; None trains with cross-entropy only
    build: Callable[[Widths], nn.Module] | None
    cross_entropy_weight: float = 1.0
    twin: str | None = (
        None  # the entry of the same loss by the reference, whose curves this one has to follow
    )


class LogitDistillation(nn.Module):
    """Hinton et al., 2015 (arXiv:1503.02531): mean KL of softened logits, times T^2."""

    def __init__(self, weight: float, temperature: float) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student.logits / self.temperature, dim=1)
        p = F.softmax(teacher.logits / self.temperature, dim=1)
        return self.weight * self.temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


class ReferenceSimilarity(nn.Module):
    """Similarity preservation as usually written: B x B matrices in memory, and autograd."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        squares = reference.gram_mse(student.features.flatten(1), teacher.features.flatten(1))
        return self.weight * squares / len(student.features) ** 2


class OnFeatures(nn.Module):
    """Applies a loss of this package to the features."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        return self.loss(student.features, teacher.features)


class OnLogits(nn.Module):
    """Applies a loss of this package to the logits and the labels."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        return self.loss(student.logits, teacher.logits, labels)


class OnLabels(nn.Module):
    """Applies a loss of embeddings and labels to the student's features; no teacher is asked."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        return self.loss(student.features.flatten(1), labels)


SP_WEIGHT = 3000.0  # the published one
TRIPLET_WEIGHT = 0.1  # ours: nothing is published for this loss beside a cross-entropy on this data

ENTRIES = (
    Entry("ce", "cross-entropy only", None),
    Entry(
        "kd",
        "logit KD",
        lambda _: LogitDistillation(weight=0.9, temperature=4.0),
        cross_entropy_weight=0.1,
    ),
    Entry(
        "triplet",
        "batch-hard triplet",
        lambda _: OnLabels(kd.nn.BatchHardTripletLoss(weight=TRIPLET_WEIGHT)),
    ),
    # margin, weight and random negatives are the authors'
    Entry(
        "triplet-kd",
        "triplet distillation",
        lambda _: OnLogits(kd.nn.TripletDistillationLoss()),
    ),
    Entry("sp-reference", "SP, reference", lambda _: ReferenceSimilarity(SP_WEIGHT)),
    Entry(
        "sp-kernels",
        "SP, kernels",
        lambda _: OnFeatures(kd.nn.SimilarityPreservingLoss(SP_WEIGHT)),
        twin="sp-reference",
    ),
)


def entry(name: str) -> Entry:
    """The entry of that name."""
    (found,) = (candidate for candidate in ENTRIES if candidate.name == name)
    return found
