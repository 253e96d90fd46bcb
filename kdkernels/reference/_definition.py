# SPDX-License-Identifier: Apache-2.0
"""What turns the formula of an op into a function that users may call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from kdkernels import _checks


def definition(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that are one of several words are checked, by the annotations, and tensors of
    different floating dtypes are taken in the widest, as the public function does."""
    words = {
        name: get_args(hint)
        for name, hint in get_type_hints(function).items()
        if get_origin(hint) is Literal
    }

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        for name, allowed in words.items():
            if name in options:
                _checks.choice(name, options[name], allowed)
        dtypes = {x.dtype for x in (*args, *options.values()) if _has_a_say(x)}
        if len(dtypes) < 2:
            return function(*args, **options)
        wide = _checks.common_dtype(*dtypes)
        args = tuple(x.to(wide) if _has_a_say(x) else x for x in args)
        options = {name: x.to(wide) if _has_a_say(x) else x for name, x in options.items()}
        return function(*args, **options)

    return call


def _has_a_say(x: Any) -> bool:
    """In the dtype of the result."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0


def counting(sample_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows that count of each tensor."""
    return tensors if sample_mask is None else tuple(x[sample_mask] for x in tensors)


def reduced(rows: Tensor, reduction: str, sample_mask: Tensor | None = None) -> Tensor:
    """The mean or the sum over the losses of the rows that count, or the losses of all rows, 0
    where one does not count."""
    if sample_mask is not None:
        rows = rows.where(sample_mask, 0.0)
    if reduction == "none":
        return rows
    count = len(rows) if sample_mask is None else int(sample_mask.sum())
    return rows.sum() / (max(count, 1) if reduction == "mean" else 1)
