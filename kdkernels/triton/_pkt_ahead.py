# SPDX-License-Identifier: Apache-2.0
"""Calls of pkt that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kdkernels.triton._ahead import AotVariant, variants_of
from kdkernels.triton._common import Arch

# label -> B, D, kernel, divergence
_COSINE = {"cosine": (4096, 128, "cosine", "kl")}
_STUDENT_T = {"student_t": (4096, 128, "student_t", "jeffreys")}
_ODD = {"odd": (333, 37, "cosine", "jeffreys")}


def variants(arch: Arch, forward: Callable[..., Any]) -> Iterator[AotVariant]:
    return variants_of(
        arch,
        partial(_call, forward),
        everywhere={"bf16": _STUDENT_T, "fp32": _COSINE},
        extra={"bf16": _COSINE | _ODD, "fp16": _COSINE},
    )


def _call(
    forward: Callable[..., Any], dtype: torch.dtype, B: int, D: int, kernel: str, divergence: str
) -> None:
    student, teacher = (torch.empty(B, D, dtype=dtype, device="meta") for _ in range(2))
    forward(student, teacher, kernel, divergence, True)
