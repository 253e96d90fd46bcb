# SPDX-License-Identifier: Apache-2.0
"""The registry of what the demo distils with. A loss joins by one more `Entry` in `ENTRIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.demo.data import Data
from kdkernels.demo.models import EVALUATION_BATCH, ConvNet, Outputs


@dataclass(frozen=True)
class Setting:
    """What a criterion can be made from, all of it known before the student trains."""

    data: Data
    teacher: ConvNet  # frozen
    taught: Outputs  # the teacher's, on the training set
    held_out: Outputs  # the teacher's, on the test set
    student_width: int  # of the flattened features
    folder: Path  # for files that a criterion keeps

    @property
    def teacher_width(self) -> int:
        return self.teacher.head.in_features


class Criterion(nn.Module):
    """A loss of what student and teacher say about the training samples of a batch.

    Its parameters are trained with the student.
    """

    def forward(
        self,
        student: Outputs,  # of B samples
        teacher: Outputs,  # of the same
        labels: Tensor,  # [B]
        index: Tensor,  # [B] where the samples are in the training set
    ) -> Tensor:
        raise NotImplementedError

    def agreement(self, student: Outputs) -> float | None:
        """Share of the hash bits on the test set that student and teacher have in common; None of
        a loss without hash bits."""
        return None


@dataclass(frozen=True)
class Entry:
    """One way to train the student: weighted cross-entropy plus a criterion."""

    name: str  # for --losses
    label: str  # for tables and plots
    build: Callable[[Setting], Criterion] | None  # None trains with cross-entropy only
    cross_entropy_weight: float = 1.0
    twin: str | None = (
        None  # the entry of the same loss by the reference, whose curves this one has to follow
    )


class LogitDistillation(Criterion):
    """Hinton et al., 2015 (arXiv:1503.02531): mean KL of softened logits, times T^2."""

    def __init__(self, weight: float, temperature: float) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        log_q = F.log_softmax(student.logits / self.temperature, dim=1)
        p = F.softmax(teacher.logits / self.temperature, dim=1)
        return self.weight * self.temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


class ReferenceSimilarity(Criterion):
    """Similarity preservation as usually written: B x B matrices in memory, and autograd."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        s, t = (side.features.flatten(1) for side in (student, teacher))
        return self.weight * kd.reference.gram_mse(s, t)


class OnFeatures(Criterion):
    """Applies a loss of this package to the features."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        return self.loss(student.features, teacher.features)


class Relations(OnFeatures):
    """Relational representation distillation, as its authors set it but for the length of the
    queue, which is about that of the training set: a longer one would hold samples twice."""

    def __init__(self, setting: Setting) -> None:
        loss = kd.nn.RelationalRepresentationLoss(
            setting.student_width, setting.teacher_width, queue_size=len(setting.data.x)
        )
        super().__init__(loss.to(setting.data.x.device))


class Sum(Criterion):
    """Of several criteria without hash bits."""

    def __init__(self, *criteria: Criterion) -> None:
        super().__init__()
        self.criteria = nn.ModuleList(criteria)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        return sum(criterion(student, teacher, labels, index) for criterion in self.criteria)


class OnLogits(Criterion):
    """Applies a loss of this package to the logits and the labels."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        return self.loss(student.logits, teacher.logits, labels)


class OnPredictions(Criterion):
    """Applies a loss of this package to the logits."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        return self.loss(student.logits, teacher.logits)


class OnLabels(Criterion):
    """Applies a loss of embeddings and labels to the student's features; no teacher is asked."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        return self.loss(student.features.flatten(1), labels)


class HashBits(Criterion):
    """Mimicking of features and of their hash bits, which the teacher's features give in each
    step, where the teacher classifies the sample correctly."""

    def __init__(self, setting: Setting, form: str = "lshl2_s") -> None:
        super().__init__()
        widths_differ = setting.student_width != setting.teacher_width
        loss = kd.nn.LSHFeatureMimickingLoss(
            setting.teacher_width,
            HASH_WEIGHT,
            form,
            hash_bits=HASH_BITS,
            classifier_weight=setting.teacher.head.weight,
            student_dim=setting.student_width if widths_differ else None,
        )
        self.loss = loss.to(setting.data.x.device)
        self.loss.fit_bias(setting.taught.features.flatten(1))
        self.register_buffer("held_out_codes", self.loss.encode(setting.held_out.features))

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        correct = teacher.logits.argmax(1) == labels
        return self.loss(student.features, teacher.features, sample_mask=correct)

    @torch.no_grad()
    def agreement(self, student: Outputs) -> float:
        features = student.features.flatten(1)
        if self.loss.adapter is not None:
            features = self.loss.adapter(features)
        different = self.loss.encode(features) ^ self.held_out_codes
        places = torch.arange(8, dtype=torch.uint8, device=different.device)
        each = different[:, :, None] >> places & 1  # [N_test, bytes, 8]
        return 1 - each.sum().item() / (len(features) * self.loss.hash_bits)


class CachedHashBits(HashBits):
    """Hash bits only, from a file in which the frozen teacher's are written once. They are those
    of the samples as they are: this demo trains without augmentation."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, "lsh")
        path, x = setting.folder / CODES_NAME, setting.data.x
        kd.nn.encode_dataset(
            setting.teacher,
            x.split(EVALUATION_BATCH),
            self.loss,
            path,
            features=lambda outputs: outputs.features,
            progress=False,
        )
        self.cache = kd.nn.CodeCache(
            path, criterion=self.loss, teacher=setting.teacher, samples=len(x)
        )

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, index: Tensor) -> Tensor:
        codes = self.cache[index].to(student.features.device)
        return self.loss(student.features, codes=codes)


SP_WEIGHT = 3000.0  # the published one
TRIPLET_WEIGHT = 0.1  # ours: nothing is published for this loss beside a cross-entropy on this data
HASH_WEIGHT = 6.0  # the published one for CIFAR-100
HASH_BITS = 512  # the published 32 a feature would take most of the demo's time
CODES_NAME = "teacher.codes"

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
    # weights, temperatures and width are the authors', of both
    Entry("rrd", "RRD", Relations),
    Entry(
        "rrd-kd",
        "RRD and logit KD",
        lambda setting: Sum(Relations(setting), LogitDistillation(weight=1.0, temperature=4.0)),
    ),
    # with the weight of RepDistiller; at batches of thousands the authors advise against angles
    Entry("rkd", "RKD, distances", lambda _: OnFeatures(kd.nn.RKDLoss(angle_weight=0.0))),
    # both with the published weights
    Entry("pkt", "PKT", lambda _: OnFeatures(kd.nn.PKTLoss())),
    Entry("dist", "DIST", lambda _: OnPredictions(kd.nn.DISTLoss())),
    Entry("lshl2", "LSH (with L2)", HashBits),
    Entry("lsh-cached", "LSH, cached codes", CachedHashBits),
)


def entry(name: str) -> Entry:
    """The entry of that name."""
    (found,) = (candidate for candidate in ENTRIES if candidate.name == name)
    return found
