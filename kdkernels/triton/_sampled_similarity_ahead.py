# SPDX-License-Identifier: Apache-2.0
"""Calls of sampled_similarity that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kdkernels.triton._ahead import AotVariant, variants_of
from kdkernels.triton._common import Arch

# label -> B, K, D, N
_CORE = {"crd": (64, 16385, 128, 50000)}
_MORE = {"odd": (33, 101, 37, 1000)}


def variants(
    arch: Arch, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Iterator[AotVariant]:
    return variants_of(
        arch,
        partial(_call, forward, backward),
        everywhere={"fp32": _CORE},
        extra={"bf16": _MORE},
    )


def _call(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    dtype: torch.dtype,
    B: int,
    K: int,
    D: int,
    N: int,
) -> None:
    x, bank = (torch.empty(rows, D, dtype=dtype, device="meta") for rows in (B, N))
    indices = torch.empty(B, K, dtype=torch.int64, device="meta")
    backward(forward(x, bank, indices), x, bank, indices)
