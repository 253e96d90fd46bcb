# SPDX-License-Identifier: Apache-2.0
"""Calls of correlation that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kdkernels.triton._ahead import AotVariant, variants_of
from kdkernels.triton._common import Arch

# label -> B, C, centered
_IMAGENET = {"imagenet": (256, 1000, True)}
_PIXELS = {"pixels": (32768, 19, False)}


def variants(arch: Arch, forward: Callable[..., Any]) -> Iterator[AotVariant]:
    return variants_of(
        arch,
        partial(_call, forward),
        everywhere={"fp32": _IMAGENET},
        extra={"bf16": _PIXELS},
    )


def _call(forward: Callable[..., Any], dtype: torch.dtype, B: int, C: int, centered: bool) -> None:
    student, teacher = (torch.empty(B, C, dtype=dtype, device="meta") for _ in range(2))
    forward(student, teacher, 4.0, 1.0, 1.0, centered, 1e-8, True)
