# SPDX-License-Identifier: Apache-2.0
"""Contrastive representation distillation (Tian, Krishnan and Isola, ICLR 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._state import ProcessState, once
from kdkernels.nn.key_queue import MOST
from kdkernels.ops import _key_bank, _rows
from kdkernels.ops.noise_contrastive import NoiseContrastive, move_rows, noise_contrastive


class CRDLoss(ProcessState):
    r"""Student and teacher shall tell each other's embedding of a sample from those of others.

    Two memories hold an embedding of every sample of the data set, one per side. The student's
    embedding of a sample is scored against the row of that sample and `num_negatives` random rows
    of the teacher's memory, the teacher's embedding against the same rows of the student's memory.
    Both losses of noise contrastive estimation (`kdkernels.ops.noise_contrastive`) are added. The
    B x K x dim rows are never in memory.

    In training mode both memories are then moved: a row becomes `momentum` times what it was plus
    the rest of the new embedding, with unit norm. Each side's partition is set by its first batch
    in training mode, and stays; in evaluation mode before that, each batch sets it for itself.
    With `update=False` the value is the same and nothing moves.

    Memories and partitions are state of this process, like the keys of a `KeyQueue`: they are in
    `state_dict` but no buffers, and `DistributedDataParallel` leaves each process its own. A
    process knows the embeddings of the samples that it has seen.

    In a block under `torch.utils.checkpoint` the memories move in the forward and not again, and
    the gradient is that of the loss which was returned, with the negatives that were drawn. What
    cannot be computed again raises: call backward before the next forward with other rows, and
    keep a compiled loss outside of such a block.

    As the authors' code does it, with two differences: norms of embeddings are clamped at 1e-12,
    and logarithms replace exponentials, which underflow.

    Args:
        student_dim, teacher_dim: Widths of the (flattened) features.
        num_samples: Of the data set, to which `index` points.
        weight: Factor of the loss. 0.8 is the authors', beside a cross-entropy of weight 1.
        dim: Width of the embeddings.
        num_negatives: How many others a sample is told from.
        temperature: Of the scores.
        momentum: Of the memories, from 0 to 1.
        generator: For the first memories; None is torch's own.
        backend: See `kdkernels.explain`.

    Shape:
        - student: [B, ...], teacher: [B, ...], flattened. The teacher's features are detached.
        - index: where the samples are in the data set, integer [B]. Of samples that occur twice
          the last embedding is kept.
        - negatives: other rows for each sample, integer [B, num_negatives]; None draws them
          uniformly from the whole data set, the sample itself and its class included, as the
          authors' code does without its "exact" mode. To leave the class of the
          sample out, as that mode does, draw them where labels are known.
        - update: False computes the loss and leaves the memories and partitions as they are.
        - sample_mask: which samples count, bool [B]: the step is that of the batch without the
          others, which may hold anything and enter no memory. Their number is read, for which a GPU
          is waited for, and `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for a module in fp64).

    Attributes:
        embed_student, embed_teacher: Linear layers, both trained: give the parameters of this
            module to the optimiser.
        student_memory, teacher_memory: [num_samples, dim]; at first uniform numbers with
            rows of norm near 1.
        log_partitions: [2], logarithms of the partitions of the student's scores and of
            the teacher's; NaN before they are set.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        RuntimeError: a forward that cannot be computed again is, see above.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.CRDLoss(64, 256, num_samples=len(dataset))
        >>> loss = criterion(student_features, teacher_features, index)

    Reference:
        Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020,
        arXiv:1910.10699.
    """

    state_names = ("student_memory", "teacher_memory", "log_partitions")

    student_memory: Tensor
    teacher_memory: Tensor
    log_partitions: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        weight: float = 0.8,
        *,
        dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        generator: torch.Generator | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        student_dim = _checks.count("student_dim", student_dim, 1, MOST)
        teacher_dim = _checks.count("teacher_dim", teacher_dim, 1, MOST)
        num_samples = _checks.count("num_samples", num_samples, 1, MOST)
        dim = _checks.count("dim", dim, 1, MOST)
        num_negatives = _checks.count("num_negatives", num_negatives, 1, MOST)
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.num_negatives, self.backend = num_negatives, backend
        self.temperature = _checks.positive("temperature", temperature)
        self.momentum = _checks.not_negative("momentum", momentum)
        if self.momentum > 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
        self.embed_student = nn.Linear(student_dim, dim)
        self.embed_teacher = nn.Linear(teacher_dim, dim)
        for side in ("student", "teacher"):
            bound = 1 / math.sqrt(dim / 3)
            first = torch.rand(num_samples, dim, generator=generator) * (2 * bound) - bound
            setattr(self, f"{side}_memory", first)
        self.log_partitions = torch.full((2,), torch.nan)

    def sample(
        self,
        index: Tensor,  # [B]
        generator: torch.Generator | None = None,
    ) -> Tensor:  # [B, num_negatives]
        """Uniform negatives for each sample, drawn on its device."""
        # generator=None beside sizes that a compiler does not know is more than torch takes
        source = {} if generator is None else {"generator": generator}
        size = (index.shape[0], self.num_negatives)
        return torch.randint(self.student_memory.shape[0], size, device=index.device, **source)

    def forward(
        self,
        student: Tensor,  # [B, ...]
        teacher: Tensor,  # [B, ...]
        index: Tensor,  # [B]
        negatives: Tensor | None = None,  # [B, num_negatives]
        *,
        update: bool = True,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        student, teacher = _arguments.flat_pair("", student, teacher)
        _checks.labels("index", index, "student", student)
        student, teacher, index = _rows.select(
            sample_mask, student=student, teacher=teacher, index=index.long()
        )
        if negatives is not None:
            (negatives,) = _rows.select(sample_mask, negatives=negatives)
        moves = _checks.flag("update", update) and self.training
        s = _arguments.unit_rows(
            _arguments.embedded(self.embed_student, student), self.student_memory
        )
        t = _arguments.unit_rows(
            _arguments.embedded(self.embed_teacher, teacher), self.teacher_memory
        )
        of_student, of_teacher = self.step(
            (s, t, index),
            lambda drawn: self._losses(s, t, index, drawn if negatives is None else negatives),
            first=lambda: self.sample(index) if negatives is None else None,
            then=(lambda losses: self._move(s, t, index, losses)) if moves else None,
        )
        return self.weight * (of_student.loss + of_teacher.loss)

    def _losses(
        self,
        s: Tensor,  # [B, dim]
        t: Tensor,  # [B, dim]
        index: Tensor,  # [B]
        negatives: Tensor,  # [B, num_negatives]
    ) -> tuple[NoiseContrastive, NoiseContrastive]:
        self._check(index, negatives)
        rows = torch.cat([index[:, None], negatives.long()], 1)
        options = {"temperature": self.temperature, "backend": self.backend}
        partitions = once(self.log_partitions)
        return (
            noise_contrastive(s, self.teacher_memory, rows, partitions[0], **options),
            noise_contrastive(t, self.student_memory, rows, partitions[1], **options),
        )

    def _move(
        self,
        s: Tensor,  # [B, dim]
        t: Tensor,  # [B, dim]
        index: Tensor,  # [B]
        losses: tuple[NoiseContrastive, NoiseContrastive],
    ) -> None:
        def write() -> None:
            move_rows(self.student_memory, index, s, self.momentum)
            move_rows(self.teacher_memory, index, t, self.momentum)
            self.log_partitions.copy_(torch.stack([loss.log_partition for loss in losses]))

        overwritten = {"student_memory": index, "teacher_memory": index, "log_partitions": None}
        self.move(overwritten, write)

    def _check(self, index: Tensor, negatives: Tensor) -> None:
        """By name here, where the operator only knows the two side by side."""
        expected = [index.shape[0], self.num_negatives]
        _checks.integer("negatives", negatives)
        if list(negatives.shape) != expected:
            raise ValueError(f"negatives must have shape {expected}, got {list(negatives.shape)}")
        _checks.same_device("negatives", negatives, "index", index)
        num_samples = self.student_memory.shape[0]
        for name, given in (("index", index), ("negatives", negatives)):
            _key_bank.within(name, given, 0, num_samples)

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight:g}, num_samples={self.student_memory.shape[0]}, "
            f"num_negatives={self.num_negatives}, temperature={self.temperature:g}, "
            f"momentum={self.momentum:g}, backend={self.backend!r}"
        )
