# SPDX-License-Identifier: Apache-2.0
"""Distillation of similarity distributions: SEED, CompRess and SSKD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._state import once
from kdkernels.nn.key_queue import MOST, KeyQueue
from kdkernels.ops import _rows
from kdkernels.ops.best_ranked import best_ranked
from kdkernels.ops.relational_kl import relational_kl


@dataclass(frozen=True)
class _Preset:
    student_temperature: float
    teacher_temperature: float
    divergence: Literal["kl", "cross_entropy"]
    weight: float = 1.0
    queue_size: int | None = None  # None: the keys are the batch's
    two_queues: bool = False
    own_key: bool = False
    views: int | None = None
    share_of_wrong: float | None = None


PRESETS = {
    "seed": _Preset(0.2, 0.01, "cross_entropy", queue_size=65536, own_key=True),
    "compress": _Preset(0.04, 0.04, "kl", queue_size=128000, two_queues=True),
    "compress_1q": _Preset(0.04, 0.04, "kl", queue_size=128000),
    "sskd": _Preset(0.5, 0.5, "kl", weight=10.0, views=4, share_of_wrong=0.75),
}


class SimilarityDistillationLoss(nn.Module):
    r"""The student's similarities to other samples shall be distributed as the teacher's.

    Embeddings of both sides are divided by their norms. A row's similarities to keys, divided by a
    temperature, give a softmax on either side; their divergence is averaged over the batch
    (`kdkernels.relational_kl`). What the keys are is a matter of the preset:

    | preset        | keys                                       | divergence    | temperatures  |
    |---------------|--------------------------------------------|---------------|---------------|
    | "seed"        | queue of teacher embeddings, and for each  | cross_entropy | 0.2, 0.01     |
    |               | row its own teacher embedding              |               |               |
    | "compress"    | two queues, each side meets its own        | kl            | 0.04, 0.04    |
    | "compress_1q" | queue of teacher embeddings                | kl            | 0.04, 0.04    |
    | "sskd"        | the batch's first views                    | kl            | 0.5, 0.5      |

    - "seed" (SEED): 0.01 for the teacher is the paper's; the default of its public code is
      `teacher_temperature=1e-4`, at which the teacher's distribution is one-hot on the row's own
      key.
    - "compress" is CompRess with a queue of the student's own embeddings, "compress_1q" its variant
      with one queue; both need no own key. For the variant with an exponentially averaged student,
      keep a `KeyQueue` of that one's embeddings and call `kdkernels.relational_kl`.
    - "sskd" (SSKD): the batch holds `views` consecutive rows per image, the plain one first. The
      others are compared with all plain ones. Of these rows count those whose own image the teacher
      finds nearest, and the best-ranked `share_of_wrong` of the others, rounded down; ties go to
      the first. The mean is multiplied by both temperatures (their code's T^2, 0.25), and the
      preset's weight is the authors' 10 for this term. Theirs is 0 / 0 where no row counts, here it
      is 0. The gradient of the student reaches both kinds of rows.

    Queues enter the loss before the batch enters them. They start with random rows of unit norm
    (CompRess's code: uniform numbers, norms near 1). Projection heads are the user's: apply them
    before, and train them there (SEED: two layers to 128; SSKD: two layers, the teacher's trained
    beforehand). Each process has its own queue.

    Args:
        student_dim, teacher_dim: Widths of the embeddings; None for "sskd", which keeps nothing.
            Both sides of "seed" and "compress_1q" share one width; a `teacher_dim` that is left out
            is the student's.
        weight: Factor of the loss; None takes that of the preset, 1 or 10.
        preset: See above.
        queue_size: Number of keys; None takes 65536 for "seed" and 128000 for CompRess.
        student_temperature, teacher_temperature: In place of the preset's.
        views: Of an image in a batch, for "sskd"; None takes 4.
        share_of_wrong: From 0 to 1, for "sskd"; None takes 0.75.
        backend: See `kdkernels.explain`.

    Shape:
        - student: [B, student_dim], teacher: [B, teacher_dim]. The teacher is detached.
        - update: False computes the same value and leaves the queue as it is: see `InfoNCELoss` for
          two views.
        - sample_mask: which samples count, bool [B]: the step is that of the batch without the
          others, which may hold anything and enter no queue. Their number is read, for which a GPU
          is waited for, and `torch.compile(fullgraph=True)` refuses it. None: all. Not for
          "sskd", whose rows belong together.
        - output: scalar, fp32 (fp64 for fp64).

    Attributes:
        queue: `KeyQueue`, which moves on in training mode only, or None; see there for several
            processes and for blocks under `torch.utils.checkpoint`, where it moves once.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.SimilarityDistillationLoss(512, 2048, preset="compress")
        >>> loss = criterion(student_embeddings, teacher_embeddings)

    Reference:
        Fang et al., SEED, ICLR 2021, arXiv:2101.04731; Abbasi Koohpayegani et al., CompRess,
        NeurIPS 2020, arXiv:2010.14713; Xu et al., Knowledge Distillation Meets Self-Supervision,
        ECCV 2020, arXiv:2006.07114.
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        weight: float | None = None,
        *,
        preset: Literal["seed", "compress", "compress_1q", "sskd"] = "seed",
        queue_size: int | None = None,
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        views: int | None = None,
        share_of_wrong: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("preset", preset, tuple(PRESETS))
        found = PRESETS[preset]
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.preset, self.backend = preset, backend
        self.weight = _arguments.weight(found.weight if weight is None else weight)
        self.student_temperature = _checks.positive(
            "student_temperature",
            found.student_temperature if student_temperature is None else student_temperature,
        )
        self.teacher_temperature = _checks.positive(
            "teacher_temperature",
            found.teacher_temperature if teacher_temperature is None else teacher_temperature,
        )
        self.queue, self.views, self.share_of_wrong = None, None, None
        if found.queue_size is None:
            _absent(preset, student_dim=student_dim, teacher_dim=teacher_dim, queue_size=queue_size)
            self.views = _checks.count("views", found.views if views is None else views, 2, MOST)
            share = found.share_of_wrong if share_of_wrong is None else share_of_wrong
            self.share_of_wrong = _checks.not_negative("share_of_wrong", share)
            if self.share_of_wrong > 1:
                raise ValueError(f"share_of_wrong must be from 0 to 1, got {share}")
            return
        _absent(preset, views=views, share_of_wrong=share_of_wrong)
        student_dim = _checks.count("student_dim", student_dim, 1, MOST)
        teacher_dim = student_dim if teacher_dim is None else teacher_dim
        teacher_dim = _checks.count("teacher_dim", teacher_dim, 1, MOST)
        if not found.two_queues and teacher_dim != student_dim:
            raise ValueError(
                f"teacher_dim must be {student_dim} like student_dim for preset {preset!r}, "
                f"got {teacher_dim}"
            )
        size = found.queue_size if queue_size is None else queue_size
        size = _checks.count("queue_size", size, 1, MOST)
        self.queue = KeyQueue(
            size, teacher_dim, student_dim=student_dim if found.two_queues else None
        )

    def forward(
        self,
        student: Tensor,  # [B, ...]
        teacher: Tensor,  # [B, ...]
        *,
        update: bool = True,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        student, teacher = _arguments.flat_pair("", student, teacher)
        if self.queue is None and sample_mask is not None:
            raise ValueError(f"sample_mask must be None for preset {self.preset!r}, got a mask")
        student, teacher = _rows.select(sample_mask, student=student, teacher=teacher)
        moves = _checks.flag("update", update) and self.training
        return self.weight * (
            self._among_views(student, teacher)
            if self.queue is None
            else self._against_queue(student, teacher.detach(), moves)
        )

    def _divergence(self, s: Tensor, t: Tensor, *keys: Tensor, **options: Any) -> Tensor:
        return relational_kl(
            s,
            t,
            *keys,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            divergence=PRESETS[self.preset].divergence,
            backend=self.backend,
            **options,
        )

    def _against_queue(self, student: Tensor, teacher: Tensor, moves: bool) -> Tensor:
        found, queue = PRESETS[self.preset], self.queue
        for name, x, keys in (
            ("student", student, queue.keys if queue.student_keys is None else queue.student_keys),
            ("teacher", teacher, queue.keys),
        ):
            if x.shape[1] != keys.shape[1]:
                raise ValueError(
                    f"{name} must have {keys.shape[1]} columns, its {name}_dim, got {x.shape[1]}"
                )
        s, t = (_arguments.unit_rows(x, queue.keys) for x in (student, teacher))
        t = once(t)
        own = t if found.own_key else None

        def loss(_: Any) -> Tensor:
            if found.two_queues:
                return self._divergence(s, t, queue.student_keys, queue.keys, normalize=False)
            return self._divergence(s, t, queue.keys, own_keys=own, normalize=False)

        def enqueue(_: Any) -> None:
            queue.enqueue(t, s if found.two_queues else None)

        return queue.step((s, t), loss, then=enqueue if moves else None)

    def _among_views(self, student: Tensor, teacher: Tensor) -> Tensor:
        B, others = student.shape[0], self.views - 1
        if B % self.views:
            raise ValueError(
                f"student must have a multiple of {self.views} rows, the views of each image, "
                f"got {B}"
            )
        if B == 0:
            return student.sum(dtype=_checks.accumulation_dtype(student.dtype))  # 0, with a graph
        images = B // self.views
        of_student, of_teacher = (
            x.unflatten(0, (images, self.views)) for x in (student, teacher.detach())
        )
        plain_s, plain_t = of_student[:, 0], of_teacher[:, 0]
        s, t = of_student[:, 1:].flatten(0, 1), of_teacher[:, 1:].flatten(0, 1)
        positives = torch.arange(images, device=t.device).repeat_interleave(others)
        counts = best_ranked(t, plain_t, positives, self.share_of_wrong)
        rows = self._divergence(s, t, plain_s, plain_t, reduction="none")
        mean = rows.where(counts, 0.0).sum() / counts.sum().clamp_min(1)
        return mean * (self.student_temperature * self.teacher_temperature)

    def extra_repr(self) -> str:
        shown = (
            f"weight={self.weight:g}, preset={self.preset!r}, "
            f"student_temperature={self.student_temperature:g}, "
            f"teacher_temperature={self.teacher_temperature:g}"
        )
        if self.queue is None:
            shown += f", views={self.views}, share_of_wrong={self.share_of_wrong:g}"
        return f"{shown}, backend={self.backend!r}"


def _absent(preset: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must be None for preset {preset!r}, got {value}")
