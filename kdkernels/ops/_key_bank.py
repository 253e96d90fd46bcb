# SPDX-License-Identifier: Apache-2.0
"""What the ops on a bank of keys share: checks, and the tensors that their operators take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import TensorForm, form
from kdkernels._key_bank_call import KeyBankCall
from kdkernels._similarity import unit

REDUCTIONS = ("mean", "sum", "none")


def check_meeting(name: str, keys: Any, rows_name: str, rows: Any) -> None:
    """A matrix of the width and on the device of the rows that meet it."""
    _checks.matrix(rows_name, rows)
    _checks.matrix(name, keys)
    _checks.same_device(name, keys, rows_name, rows)
    _checks.same_columns(name, keys, rows_name, rows)


def check_bank(name: str, keys: Any, rows_name: str, rows: Any) -> None:
    """A matrix that rows meet, with at least one row."""
    check_meeting(name, keys, rows_name, rows)
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


def check_num_keys(num_keys: Any, keys: Tensor) -> None:
    """None, a number from 1 to that of the keys, or an integer tensor without dimensions."""
    if isinstance(num_keys, Tensor):
        _checks.integer("num_keys", num_keys)
        if num_keys.dim() != 0:
            raise ValueError(f"num_keys must have no dimension, got shape {list(num_keys.shape)}")
        _checks.same_device("num_keys", num_keys, "keys", keys)
    elif num_keys is not None:
        _checks.count("num_keys", num_keys, 1, keys.shape[0])


def check_exclude(exclude: Any, rows_name: str, rows: Tensor, keys: Tensor) -> None:
    """One key per row by index, or a bool mask of rows and keys."""
    if not isinstance(exclude, Tensor) or exclude.dtype != torch.bool:
        _checks.labels("exclude", exclude, rows_name, rows)
        return
    if exclude.shape != (len(rows), len(keys)):
        raise ValueError(
            f"exclude must have shape {[len(rows), len(keys)]}, a row per row of {rows_name} and a "
            f"column per key, where it is a mask, got {list(exclude.shape)}"
        )
    _checks.same_device("exclude", exclude, rows_name, rows)


def excluded(
    exclude: Tensor,  # [B]
    sample_mask: Tensor | None,  # [B]
    keys: Tensor,  # [K, D]
) -> Tensor:  # [B] int64
    """One key per row by index, -1 for a row that does not count."""
    exclude = exclude.long()  # first: an unsigned dtype holds no -1
    if sample_mask is not None:
        exclude = exclude.masked_fill(~sample_mask, -1)
    within("exclude", exclude, -1, keys.shape[0])
    return exclude


def counting(num_keys: int | Tensor | None, keys: Tensor) -> int:
    """How many keys count, or how many there are where the number lies on a device that would be
    waited for. Refuses a number in a tensor that is out of range."""
    K = keys.shape[0]
    if isinstance(num_keys, Tensor):
        return _checks.count("num_keys", int(num_keys), 1, K) if known(num_keys) else K
    return K if num_keys is None else num_keys


def within(name: str, index: Tensor, low: int, K: int) -> None:
    """From `low` to K - 1. Numbers are read where that waits for no device."""
    if not known(index) or index.numel() == 0:
        return
    least, most = (int(value) for value in index.long().aminmax())
    if least < low or most >= K:
        raise ValueError(
            f"{name} must be from {low} to {K - 1}, got {least if least < low else most}"
        )


def known(x: Tensor) -> bool:
    """Whether reading its numbers waits for no device. A subclass of Tensor may hold none."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    if not plain or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return torch.func.debug_unwrap(x, recurse=False) is x  # under torch.vmap it has many


def counted(
    keys: Tensor | None,  # [K, D]
    num_keys: int | Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:  # [K, D]
    """The keys in a dtype, without the last ones that do not count. If the number of those that
    count is a tensor, the keys stay as many as they are, and the operator takes the number."""
    if keys is None:
        return None
    keys = keys.to(dtype)
    return keys if num_keys is None or isinstance(num_keys, Tensor) else keys[:num_keys]


def form_of_counted(
    keys: Tensor | None, num_keys: int | Tensor | None, dtype: torch.dtype
) -> TensorForm | None:
    if keys is None:
        return None
    cut = num_keys is not None and not isinstance(num_keys, Tensor)
    return form(keys, dtype=dtype, shape=(num_keys if cut else len(keys), keys.shape[1]))


def apart(call: KeyBankCall) -> KeyBankCall:
    """The same call, under torch.compile with no tensor in it twice: Dynamo passes none to an
    autograd function twice (torch 2.13), and does not show which are the same."""
    if not torch.compiler.is_compiling():
        return call
    student, *others = call[:5]
    return KeyBankCall(student, *(x if x is None else x.view_as(x) for x in others), *call[5:])


def number(by: float | Tensor) -> float:
    """The temperature as operators take it beside `factor`."""
    return 1.0 if isinstance(by, Tensor) else by


def factor(by: float | Tensor, dtype: torch.dtype) -> Tensor | None:  # []
    """A temperature that is a tensor, NaN where it is not positive; None for a number."""
    if not isinstance(by, Tensor):
        return None
    return by.to(_checks.accumulation_dtype(dtype)).where(by > 0, torch.nan)


def form_of_factor(by: float | Tensor, dtype: torch.dtype) -> TensorForm | None:
    if not isinstance(by, Tensor):
        return None
    return form(by, dtype=_checks.accumulation_dtype(dtype))


def scaled_wants_gradient(x: Tensor, by: float | Tensor) -> bool:
    """Whether rows or their temperature require a gradient."""
    return _checks.wants_gradient(x) or (isinstance(by, Tensor) and _checks.wants_gradient(by))


def scaled(
    x: Tensor,  # [B, D]
    by: float | Tensor,
    normalize: bool,
) -> Tensor:  # [B, D]
    """Rows times their scales, in the accumulation dtype, differentiable by autograd."""
    x = x.to(_checks.accumulation_dtype(x.dtype))
    x = unit(x) if normalize else x
    return x / (by.where(by > 0, torch.nan) if isinstance(by, Tensor) else by)


def form_of_index(x: Tensor | None) -> TensorForm | None:
    return None if x is None else form(x, dtype=torch.int64)
