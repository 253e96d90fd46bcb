# SPDX-License-Identifier: Apache-2.0
"""triplet_distillation: the teacher's row is the anchor, the student's row of the same sample its
positive, a student's row of another class its negative.

Random negatives cost O(B D) and need no kernel; the others are mined by the op `triplet`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form, requested_backend
from kdkernels.ops import _rows
from kdkernels.ops.triplet import TripletFunction

NEGATIVES = ("random", "hardest", "semihard")


def _check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    margin: float,
    negatives: str,
    sample_mask: Tensor | None,
    ignore_index: int | None,
    generator: torch.Generator | None,
) -> torch.dtype:
    """The dtype of both sides."""
    _checks.matrix("student", student)
    _checks.matrix("teacher", teacher)
    _checks.same_device("teacher", teacher, "student", student)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must have shape {list(student.shape)} like student, got {list(teacher.shape)}"
        )
    dtype = _checks.common_dtype(student.dtype, teacher.dtype)
    _checks.labels("labels", labels, "student", student)
    _checks.sample_mask(sample_mask, "student", student)
    _checks.ignore_index(ignore_index)
    _checks.not_negative("margin", margin)
    _checks.choice("negatives", negatives, NEGATIVES)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    return dtype


def _operator_args(
    student: Tensor, teacher: Tensor, labels: Tensor, negatives: str, **options: Any
) -> tuple[Any, ...]:
    dtype = _check(student, teacher, labels, negatives=negatives, **options)
    y = form(labels, dtype=torch.int64)
    mined = "hardest" if negatives == "random" else negatives
    sides = form(teacher, dtype=dtype), y, form(student, dtype=dtype), y
    return *sides, False, None, False, "paired", mined, options["margin"], False, "euclidean"


def _choices(negatives: str, **_: Any) -> dict[str, str]:
    return {"negatives": "drawn, no kernel runs" if negatives == "random" else negatives}


@explained_by(_operator_args, _choices, op="triplet")
def triplet_distillation(
    student: Tensor,  # [B, D]
    teacher: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    *,
    margin: float = 5.0,
    negatives: Literal["random", "hardest", "semihard"] = "random",
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
    generator: torch.Generator | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""Triplet loss between a teacher's and a student's outputs.

    With a_i the teacher's row, p_i the student's row of the same sample and n_i a student's row of
    another class, the mean over samples of

        max(|a_i - p_i| - |a_i - n_i| + margin, 0).

    The authors apply it to logits, with margin 5 and weight 2 beside the cross-entropy, and draw
    the negative anew in every step from the training set, at the price of a second forward pass of
    the student. Here it comes from the batch. The gradient reaches the student through both rows;
    the teacher is detached.

    Args:
        student, teacher: Outputs, [B, D], fp16, bf16, fp32 or fp64; the wider dtype is taken where
            they differ.
        labels: [B], any integer dtype.
        margin: Not negative; it is tied to the scale of the outputs, which are not normalised.
        negatives: "random": uniformly among the rows of other classes, as the authors do; each
            component of a difference is shifted by 1e-6 there, as in
            `torch.nn.TripletMarginLoss`. "hardest", the nearest row of another class, and
            "semihard", the nearest one farther than the positive, are extensions of this package.
        sample_mask: Which samples count, bool [B]: value and gradient are those of the batch
            without the other samples, whose rows on both sides may hold anything. The number of
            samples that count is read, for which a GPU is waited for, and
            `torch.compile(fullgraph=True)` refuses it. None: all.
        ignore_index: Label of samples that do not count, an integer; their number is read likewise.
            None: every label is a class, -1 too.
        generator: Source of the random negatives; None takes torch's default.
        backend: What mines "hardest" and "semihard"; see `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64) scalar: the mean over the samples that have such a negative, zeros
        included; 0 with a gradient of 0 if none has.

    Raises:
        TypeError, ValueError: an argument does not fit, by name.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Oki, Abe, Miyao and Kurita, Triplet Loss for Knowledge Distillation, IJCNN 2020,
        arXiv:2004.08116.
    """
    margin = _checks.not_negative("margin", margin)
    dtype = _check(
        student, teacher, labels, margin, negatives, sample_mask, ignore_index, generator
    )
    y = labels.to(torch.int64)
    index = _rows.counting(_rows.of_label(y, sample_mask, ignore_index))
    student, teacher, y = _rows.take(index, student, teacher, y)
    anchors, rows = _checks.in_dtype(dtype, teacher.detach(), student)
    chosen_backend = requested_backend(backend)
    if negatives == "random":
        acc = _checks.accumulation_dtype(rows.dtype)
        anchors, rows = anchors.to(acc), rows.to(acc)
        negative, kept = _draw(y, generator)
        chosen = torch.stack((torch.arange(len(rows), device=rows.device), negative))
        d_ap, d_an = F.pairwise_distance(anchors, rows[chosen])
        losses = torch.where(kept, (d_ap - d_an + margin).relu(), 0.0)
        return losses.sum() / kept.sum().clamp_min(1)
    total, _, valid = TripletFunction.apply(
        anchors, y, rows, None, None, False, "paired", negatives, margin, False, "euclidean",
        False, chosen_backend,
    )  # fmt: skip
    return total / valid.clamp_min(1)


def _draw(labels: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(a row of another label, drawn uniformly, or any row; whether there is one), each [B].

    Nothing of size B x B, and no wait for the device.
    """
    B = len(labels)
    ordered, order = labels.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    same = torch.searchsorted(ordered, labels, right=True) - first
    others = B - same
    device = labels.device if generator is None else generator.device
    # generator=None beside a size that a compiler does not know is more than torch takes
    source = {} if generator is None else {"generator": generator}
    # fp64, or rows beyond 2^24 could not all be drawn
    u = torch.rand(B, device=device, dtype=torch.float64, **source).to(labels.device)
    # u is at most 1 - 2^-53, whose product with a whole number is rounded to less than that number
    draw = (u * others).to(torch.int64)
    position = torch.where(draw >= first, draw + same, draw)
    return order[position.clamp_max(max(B - 1, 0))] if B else order, others > 0
