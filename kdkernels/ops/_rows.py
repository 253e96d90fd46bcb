# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch that do not count: those that `sample_mask` leaves out, and those whose label is
to be ignored.

Losses whose rows meet each other take the other rows by their indices, so value and gradient are
those of the batch without the rows. How many there are is then read, for which a GPU is waited for.
Losses in which a zero row costs nothing zero the rows and correct the divisor instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks


def counting(mask: Tensor | None) -> Tensor | None:
    """Indices of the rows that count, ascending; None where all do."""
    if mask is None:
        return None
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            "the rows that sample_mask and ignore_index let count are taken from the batch, and "
            "how many they are depends on data. Take them before the compiled function, or compile "
            "without fullgraph=True"
        )
    return mask.nonzero().squeeze(1)


def of_label(
    labels: Tensor,  # [B] int64
    sample_mask: Tensor | None,  # [B]
    ignore_index: int | None,
) -> Tensor | None:  # [B] bool
    """Which rows count; None where all do."""
    if ignore_index is None:
        return sample_mask
    labelled = labels != ignore_index
    return labelled if sample_mask is None else labelled & sample_mask


def take(index: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Rows of each tensor. The gradient of the others is 0, whatever they hold."""
    return tensors if index is None else tuple(x.index_select(0, index) for x in tensors)


def put_back(values: Tensor, index: Tensor | None, total: int) -> Tensor:
    """One value per row that counts as one per row of the batch, 0 elsewhere."""
    return values if index is None else values.new_zeros(total).index_copy(0, index, values)


def reduced(
    values: Tensor,  # [B]
    sample_mask: Tensor | None,  # [B]
    reduction: str,
) -> Tensor:
    """The mean or the sum over the rows that count, or all values, 0 where a row does not."""
    if sample_mask is not None:
        values = values.masked_fill(~sample_mask, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    rows = max(len(values), 1) if sample_mask is None else sample_mask.sum().clamp_min(1)
    return values.sum() / rows


def renumbered(
    at: Tensor,  # [B] int64
    index: Tensor | None,
    total: int,
) -> Tensor:  # [B] int64
    """Rows by their place among those that count, -1 for those that do not or are none."""
    known = (at >= 0) & (at < total)
    if index is None:
        return torch.where(known, at, -1)
    place = torch.full((total + 1,), -1, dtype=torch.int64, device=at.device)
    place[index] = torch.arange(len(index), device=at.device)
    return place[torch.where(known, at, total)]


def select(sample_mask: Any, **tensors: Any) -> tuple[Tensor, ...]:
    """The rows that count of tensors by their names, which have as many rows as the first."""
    if sample_mask is None:
        return tuple(tensors.values())
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.shape[:1] != first.shape[:1]:
            raise ValueError(
                f"{name} must have {first.shape[0]} rows like {first_name}, "
                f"got shape {list(x.shape)}"
            )
        _checks.same_device(name, x, first_name, first)
    _checks.sample_mask(sample_mask, first_name, first)
    return take(counting(sample_mask), *tensors.values())


def zeroed(
    sample_mask: Tensor,  # [..., B]
    *tensors: Tensor,  # [..., B, D]
) -> tuple[Tensor, ...]:
    """Zeros where a row does not count; its gradient is 0, whatever it holds."""
    return tuple(x.masked_fill(~sample_mask[..., None], 0.0) for x in tensors)
