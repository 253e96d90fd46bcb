# SPDX-License-Identifier: Apache-2.0
"""Relational representation distillation (Giakoumoglou and Stathaki, 2024)."""

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
from kdkernels.ops.relational_kl import DIVERGENCES, relational_kl


@dataclass(frozen=True)
class _Preset:
    student_temperature: float
    teacher_temperature: float
    enqueue_first: bool


INITS = ("random", "columns")
PRESETS = {"2025": _Preset(0.1, 0.02, True), "2024": _Preset(0.04, 0.1, False)}


class RelationalRepresentationLoss(nn.Module):
    r"""The student's similarities to past teacher embeddings shall be distributed as the teacher's.

    With s and t unit-norm linear projections of both sides' features, and Q a queue of the last
    `queue_size` rows t, the cross-entropy of softmax(s Q^T / student_temperature) against
    softmax(t Q^T / teacher_temperature), averaged over the batch. See `kdkernels.relational_kl`.

    | preset | student_temperature | teacher_temperature | the batch enters the queue           |
    |--------|---------------------|---------------------|--------------------------------------|
    | "2025" | 0.1                 | 0.02                | first: a row meets its own embedding |
    | "2024" | 0.04                | 0.1                 | after the loss                       |

    Both are what the authors' code did at the time; it changed in February 2025. What differs here:

    - The first keys are random rows of unit norm. In the authors' code their columns are normalised
      in place of the rows, which leaves rows of norm 0.09 (similarities near 0, so that they hardly
      count) until the queue has filled. `init="columns"` starts as theirs.
    - Their teacher projection is given to the optimiser but never gets a gradient: it stays at its
      random start, and so it does here, without pretending to be trained.
    - Any batch size fits any queue size.

    Args:
        student_dim, teacher_dim: Widths of the (flattened) features.
        weight: Factor of the loss.
        dim: Width of the projections.
        queue_size: Number of keys.
        preset: See above.
        init: Of the queue, "random" or "columns", see above.
        student_temperature, teacher_temperature: In place of the preset's.
        divergence: "cross_entropy", or "kl", which is 0 where both sides agree; the gradient is the
            same.
        backend: See `kdkernels.explain`.

    Shape:
        - student: [B, ...], teacher: [B, ...], flattened. The teacher is detached.
        - update: False computes the same value, from a copy of the keys where the batch enters
          first, and leaves the queue as it is: see `InfoNCELoss` for two views.
        - sample_mask: which samples count, bool [B]: the step is that of the batch without the
          others, which may hold anything and enter no queue. Their number is read, for which a GPU
          is waited for, and `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for a module in fp64).

    Attributes:
        embed_student: Linear layer, trained with the student: give the parameters of this module to
            the optimiser.
        embed_teacher: Linear layer, frozen.
        queue: `KeyQueue`, which moves on in training mode only; see there for several processes
            and for blocks under `torch.utils.checkpoint`, where it moves once.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.RelationalRepresentationLoss(64, 256)
        >>> loss = criterion(student_features, teacher_features)

    Reference:
        Giakoumoglou and Stathaki, Relational Representation Distillation, 2024, arXiv:2407.12073.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        weight: float = 1.0,
        *,
        dim: int = 128,
        queue_size: int = 16384,
        preset: Literal["2025", "2024"] = "2025",
        init: Literal["random", "columns"] = "random",
        student_temperature: float | None = None,
        teacher_temperature: float | None = None,
        divergence: Literal["cross_entropy", "kl"] = "cross_entropy",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        student_dim = _checks.count("student_dim", student_dim, 1, MOST)
        teacher_dim = _checks.count("teacher_dim", teacher_dim, 1, MOST)
        dim = _checks.count("dim", dim, 1, MOST)
        queue_size = _checks.count("queue_size", queue_size, 1, MOST)
        _checks.choice("preset", preset, tuple(PRESETS))
        _checks.choice("init", init, INITS)
        _checks.choice("divergence", divergence, DIVERGENCES)
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.preset, self.divergence, self.backend = preset, divergence, backend
        self.student_temperature = _checks.positive(
            "student_temperature",
            PRESETS[preset].student_temperature
            if student_temperature is None
            else student_temperature,
        )
        self.teacher_temperature = _checks.positive(
            "teacher_temperature",
            PRESETS[preset].teacher_temperature
            if teacher_temperature is None
            else teacher_temperature,
        )
        self.embed_student = nn.Linear(student_dim, dim)
        self.embed_teacher = nn.Linear(teacher_dim, dim).requires_grad_(False)
        self.queue = KeyQueue(queue_size, dim, init=init)

    def forward(
        self,
        student: Tensor,  # [B, ...]
        teacher: Tensor,  # [B, ...]
        *,
        update: bool = True,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        student, teacher = _arguments.flat_pair("", student, teacher)
        student, teacher = _rows.select(sample_mask, student=student, teacher=teacher)
        # keys are left as they are: those of init="columns" have no unit norm
        s = _arguments.unit_rows(_arguments.embedded(self.embed_student, student), self.queue.keys)
        with torch.no_grad():
            t = once(
                _arguments.unit_rows(
                    _arguments.embedded(self.embed_teacher, teacher), self.queue.keys
                )
            )
        before = PRESETS[self.preset].enqueue_first
        moves = _checks.flag("update", update) and self.training
        if before and self.training and not update:
            return self.weight * self.queue.step(
                (s, t), lambda _: self._divergence(s, t, self.queue.after(t)[0])
            )

        def enqueue(_: Any = None) -> None:
            self.queue.enqueue(t)

        return self.weight * self.queue.step(
            (s, t),
            lambda _: self._divergence(s, t, self.queue.keys),
            first=enqueue if moves and before else None,
            then=enqueue if moves and not before else None,
        )

    def _divergence(
        self,
        s: Tensor,  # [B, dim]
        t: Tensor,  # [B, dim]
        keys: Tensor,  # [queue_size, dim]
    ) -> Tensor:
        return relational_kl(
            s,
            t,
            keys,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            normalize=False,
            divergence=self.divergence,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight:g}, preset={self.preset!r}, init={self.queue.init!r}, "
            f"student_temperature={self.student_temperature:g}, "
            f"teacher_temperature={self.teacher_temperature:g}, divergence={self.divergence!r}, "
            f"backend={self.backend!r}"
        )
