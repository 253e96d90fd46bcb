# SPDX-License-Identifier: Apache-2.0
"""What relational_kl and info_nce share: checks of a key bank, and what comes before its sweep."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _checks
from kdkernels._similarity import NORM_EPS

REDUCTIONS = ("mean", "sum", "none")


def meet(name: str, keys: Any, rows_name: str, rows: Any) -> None:
    """A matrix of the width and on the device of the rows that meet it."""
    _checks.matrix(rows_name, rows)
    _checks.matrix(name, keys)
    _checks.same_device(name, keys, rows_name, rows)
    _checks.same_columns(name, keys, rows_name, rows)


def bank(name: str, keys: Any, rows_name: str, rows: Any) -> None:
    """A matrix that rows meet, with at least one row."""
    meet(name, keys, rows_name, rows)
    if keys.shape[0] == 0:
        raise ValueError(f"{name} must have at least 1 row, got shape {list(keys.shape)}")


def temperature(name: str, value: Any, rows: Tensor) -> float | Tensor:
    """A positive number, or a tensor of one element without dimensions, whose value no check may
    wait for."""
    if not isinstance(value, Tensor):
        return _checks.positive(name, value)
    _checks.features(name, value, min_dim=0)
    if value.dim() > 1 or value.numel() != 1:
        raise ValueError(f"{name} must have shape [] or [1], got {list(value.shape)}")
    if value.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device} like the rows, got {value.device}")
    return value.reshape(())  # one more dimension would decide on the dtype of what it divides


def indices(
    name: str, index: Any, of_name: str, of: Tensor, K: int, low: int = 0
) -> None:  # index [B]
    """One key per row."""
    _checks.labels(name, index, of_name, of)
    within(name, index, low, K)


def within(name: str, index: Tensor, low: int, K: int) -> None:
    """From `low` to K - 1. Values are looked at where that waits for no device."""
    if not _known(index) or index.numel() == 0:
        return
    least, most = (int(value) for value in index.aminmax())
    if least < low or most >= K:
        raise ValueError(
            f"{name} must be from {low} to {K - 1}, got {least if least < low else most}"
        )


def _known(x: Tensor) -> bool:
    """Whether looking at values waits for no device. A subclass of Tensor may have none to show."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling()


def limit(num_keys: Any, keys: Tensor) -> int:
    """Checks the number of keys that count; returns it, or where it is not known their most."""
    K = keys.shape[0]
    if num_keys is None:
        return K
    if isinstance(num_keys, Tensor):
        _checks.integer("num_keys", num_keys)
        if num_keys.dim() != 0:
            raise ValueError(f"num_keys must have no dimension, got shape {list(num_keys.shape)}")
        _checks.same_device("num_keys", num_keys, "keys", keys)
        if not _known(num_keys):
            return K
        num_keys = int(num_keys)
    return _checks.count("num_keys", num_keys, 1, K)


def cut(
    num_keys: int | Tensor | None,
    *banks: Tensor | None,  # [K, D]
) -> tuple[Tensor | None, ...]:
    """What the operator takes for num_keys, and the banks: cut where the number is one."""
    if isinstance(num_keys, Tensor):
        return num_keys.long(), *banks
    return None, *(x if x is None else x[:num_keys] for x in banks)


def one_dtype(named: dict[str, Tensor | None]) -> list[Tensor | None]:
    """All in the first one's dtype, or under autocast in the widest."""
    (first_name, first), *others = named.items()
    wide = first
    for name, x in others:
        if x is not None:
            _, wide = _checks.same_dtype(name, x, first_name, wide)
    return [None if x is None else x.to(wide.dtype) for x in named.values()]


def divided(
    x: Tensor,  # [B, D]
    by: float | Tensor,
    normalize: bool,
) -> Tensor:  # [B, D]
    """Rows over a temperature, in the accumulation dtype."""
    x = x.to(_checks.accumulation_dtype(x.dtype))
    x = F.normalize(x, dim=-1, eps=NORM_EPS) if normalize else x
    return x / (by.where(by > 0, torch.nan) if isinstance(by, Tensor) else by)


def scale_of(
    keys: Tensor | None,  # [K, D]
    normalize: bool,
) -> Tensor | None:  # [K]
    """One over the norm of each key, in the accumulation dtype; None for keys as they are."""
    if keys is None or not normalize:
        return None
    acc = _checks.accumulation_dtype(keys.dtype)
    with torch.no_grad():
        return torch.linalg.vector_norm(keys, dim=-1, dtype=acc).clamp_min(NORM_EPS).reciprocal()
