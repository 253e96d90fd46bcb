# SPDX-License-Identifier: Apache-2.0
"""What an operator says where its memory cannot be allocated."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# csrc/common/stable.h, torch on the CPU, and torch on a device, which counts in larger units
_BYTES = re.compile(r"(?:cannot|tried to) allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)
_SHAPE = re.compile(r"shape \[([\d, ]*)\]")


def refused(
    error: Exception,
    operator: Any,
    args: tuple[Any, ...],
    fake: Callable[..., Any],
) -> Exception | None:
    """The error of an allocation that failed, with how many bytes were asked for and for what; None
    for any other error.

    Args:
        error: What a backend raised.
        operator: The overload that ran.
        args: Its arguments.
        fake: Makes forms of its results from them.
    """
    message = str(error)
    found = _BYTES.search(message)
    bad_alloc = "bad_alloc" in message
    if found is None and not bad_alloc:
        return None
    device = next(x.device for x in args if isinstance(x, Tensor))
    asked = "memory" if found is None else found[1]
    results = fake(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
    name = _result(message, results, [each.name for each in operator._schema.returns])
    purpose = "its working memory" if name is None else f"its result {name}"
    kind = torch.OutOfMemoryError if device.type == "cuda" else RuntimeError
    return kind(
        f"{operator._schema.name} cannot allocate {asked} for {purpose} on {device}: {message}"
    )


def _result(message: str, results: Any, names: list[str]) -> str | None:
    """The result whose memory was asked for, as its name, shape and dtype; None if none was."""
    results = results if isinstance(results, (tuple, list)) else (results,)
    asked, shape = _BYTES.search(message), _SHAPE.search(message)
    for name, result in zip(names, results, strict=True):
        if asked is None or asked[1] not in _spelled(result.numel() * result.element_size()):
            continue
        if shape is None or shape[1] == ", ".join(map(str, result.shape)):
            return f"{name} of shape {list(result.shape)} and dtype {result.dtype}"
    return None


def _spelled(size: int) -> tuple[str, str]:
    """A number of bytes as the messages have it."""
    unit = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size} bytes", f"{size / 1024**unit:.2f} {' KMGT'[unit]}iB"
