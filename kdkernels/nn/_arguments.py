# SPDX-License-Identifier: Apache-2.0
"""Argument handling shared by the modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._similarity import unit

Features = Tensor | Sequence[Tensor]


def weight(value: Any) -> float:
    """A finite factor of a loss, zero allowed."""
    return _checks.not_negative("weight", value)


def pairs(student: Features, teacher: Features) -> list[tuple[str, Tensor, Tensor]]:
    """Layer pairs as (suffix of the argument's name, student, teacher); the teacher detached."""
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        return [("", student, teacher.detach())]
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, (list, tuple)):
            raise TypeError(
                "student and teacher must both be a torch.Tensor, or both a list or tuple of them, "
                f"got {type(x).__name__} as {name}"
            )
    if len(student) != len(teacher):
        raise ValueError(
            f"teacher must have {len(student)} layers like student, got {len(teacher)}"
        )
    if len(student) == 0:
        raise ValueError("student must have at least 1 layer, got an empty sequence")
    for i, layer in enumerate(zip(student, teacher, strict=True)):
        for name, x in zip(("student", "teacher"), layer, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(x).__name__}")
    return [
        (f"[{i}]", s, t.detach()) for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]


def flat_pair(
    suffix: str,
    student: Tensor,  # [B, ...]
    teacher: Tensor,  # [B, ...]
) -> tuple[Tensor, Tensor]:  # [B, D_s], [B, D_t]
    """Everything but the batch axis flattened."""
    for name, x in (("student", student), ("teacher", teacher)):
        _checks.features(name + suffix, x)
    if student.shape[0] != teacher.shape[0]:
        expected = f"{student.shape[0]} rows like student{suffix}"
        raise ValueError(f"teacher{suffix} must have {expected}, got {teacher.shape[0]}")
    return student.flatten(1), teacher.flatten(1)


def keepable(x: Tensor) -> Tensor:
    """The tensor as torch's own operations take it beside what is trained: a copy of one that was
    made under `torch.inference_mode()`, which autograd refuses to keep for the backward."""
    # Dynamo cannot trace is_inference (torch 2.13)
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def unit_rows(
    x: Tensor,  # [B, D]
    like: Tensor,
) -> Tensor:  # [B, D]
    """Rows of unit norm in another tensor's dtype, rounded once."""
    wide = x.to(_checks.accumulation_dtype(x.dtype))
    return unit(wide).to(like.dtype)
