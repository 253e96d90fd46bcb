# SPDX-License-Identifier: Apache-2.0
"""Argument handling shared by the modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._similarity import unit

Features = Tensor | Sequence[Tensor] | Mapping[Any, Tensor]
TENSOR = "torch.Tensor"


def weight(value: Any) -> float:
    """A finite factor of a loss, zero allowed."""
    return _checks.not_negative("weight", value)


def pairs(student: Features, teacher: Features) -> list[tuple[str, Tensor, Tensor]]:
    """Layer pairs as (suffix of the argument's name, student, teacher); the teacher detached."""
    kinds = [_kind(name, x) for name, x in (("student", student), ("teacher", teacher))]
    if kinds[0] != kinds[1]:
        raise TypeError(f"teacher must be a {kinds[0]} like student, got {type(teacher).__name__}")
    if kinds[0] == TENSOR:
        return [("", student, teacher.detach())]
    found = []
    for key in _layers(student, teacher):
        for name, x in (("student", student[key]), ("teacher", teacher[key])):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}[{key!r}] must be a {TENSOR}, got {type(x).__name__}")
        found.append((f"[{key!r}]", student[key], teacher[key].detach()))
    return found


def _kind(name: str, x: Any) -> str:
    if isinstance(x, Tensor):
        return TENSOR
    if isinstance(x, Mapping):
        return "dict of layers"
    if isinstance(x, (list, tuple)):
        return "list or tuple of layers"
    raise TypeError(
        f"{name} must be a {TENSOR}, or a list, tuple or dict of them, got {type(x).__name__}"
    )


def _layers(student: Any, teacher: Any) -> list[Any]:
    """Indices or keys of what both sides have, in the student's order."""
    if len(student) == 0:
        raise ValueError("student must have at least 1 layer, got none")
    if isinstance(student, Mapping):
        if student.keys() != teacher.keys():
            raise ValueError(
                f"teacher must have the layers {list(student)} like student, got {list(teacher)}"
            )
        return list(student)
    if len(student) != len(teacher):
        raise ValueError(
            f"teacher must have {len(student)} layers like student, got {len(teacher)}"
        )
    return list(range(len(student)))


def flat_pair(
    suffix: str,
    student: Tensor,  # [B, ...]
    teacher: Tensor,  # [B, ...]
) -> tuple[Tensor, Tensor]:  # [B, D_s], [B, D_t]
    """Everything but the batch axis flattened, in the dtype that both have in common."""
    for name, x in (("student", student), ("teacher", teacher)):
        _checks.features(name + suffix, x)
    if student.shape[0] != teacher.shape[0]:
        expected = f"{student.shape[0]} rows like student{suffix}"
        raise ValueError(f"teacher{suffix} must have {expected}, got {teacher.shape[0]}")
    _checks.same_device(f"teacher{suffix}", teacher, f"student{suffix}", student)
    return _checks.same_dtype(student.flatten(1), teacher.flatten(1))


def logit_rows(
    suffix: str,
    student: Tensor,  # [B, C] or [B, C, H, W]
    teacher: Tensor,  # likewise
) -> tuple[Tensor, Tensor]:  # [rows, C] both
    """A row per sample, or per pixel of a map, in the dtype that both have in common."""
    for name, x in (("student", student), ("teacher", teacher)):
        _checks.features(name + suffix, x)
        if x.dim() not in (2, 4):
            raise ValueError(
                f"{name}{suffix} must be [B, C] or [B, C, H, W], got shape {list(x.shape)}"
            )
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher{suffix} must have shape {list(student.shape)} like student{suffix}, "
            f"got {list(teacher.shape)}"
        )
    _checks.same_device(f"teacher{suffix}", teacher, f"student{suffix}", student)
    s, t = (x.movedim(1, -1).flatten(0, -2) for x in (student, teacher))
    return _checks.same_dtype(s, t)


def row_mask(
    sample_mask: Any,  # [B] or [B, H, W]
    suffix: str,
    student: Tensor,  # [B, C] or [B, C, H, W]
) -> Tensor | None:  # [rows]
    """Which of `logit_rows` count."""
    _checks.sample_mask(sample_mask, f"student{suffix}", student.movedim(1, -1))
    return None if sample_mask is None else sample_mask.flatten()


def keepable(x: Tensor) -> Tensor:
    """The tensor as torch's own operations take it beside what is trained: a copy of one that was
    made under `torch.inference_mode()`, which autograd refuses to keep for the backward."""
    # Dynamo cannot trace is_inference (torch 2.13)
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def embedded(
    linear: nn.Linear,
    x: Tensor,  # [B, D]
) -> Tensor:  # [B, out_features]
    """A linear layer of features in any dtype: the wider of theirs and the layer's is taken. Under
    autocast the layer decides, except about fp64, which autocast leaves as it is."""
    x = keepable(x)
    wide = _checks.common_dtype(x.dtype, linear.weight.dtype)
    autocast = torch.is_autocast_enabled(x.device.type) and wide != torch.float64
    if autocast or linear.weight.dtype == wide:
        return linear(x if autocast else x.to(wide))
    bias = None if linear.bias is None else linear.bias.to(wide)
    return F.linear(x.to(wide), linear.weight.to(wide), bias)


def unit_rows(
    x: Tensor,  # [B, D]
    like: Tensor,
) -> Tensor:  # [B, D]
    """Rows of unit norm in another tensor's dtype, rounded once."""
    wide = x.to(_checks.accumulation_dtype(x.dtype))
    return unit(wide).to(like.dtype)
