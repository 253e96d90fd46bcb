# SPDX-License-Identifier: Apache-2.0
"""Calls of correlation that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch

from kdkernels.testing.aot.recorder import Calls
from kdkernels.triton.correlation import correlation_fwd

# label -> B, C, centered
_IMAGENET = {"imagenet": (256, 1000, True)}
_PIXELS = {"pixels": (32768, 19, False)}

EVERYWHERE: Calls = {"fp32": _IMAGENET}
EXTRA: Calls = {"bf16": _PIXELS}


def call(dtype: torch.dtype, B: int, C: int, centered: bool) -> None:
    student, teacher = (torch.empty(B, C, dtype=dtype, device="meta") for _ in range(2))
    correlation_fwd(student, teacher, 4.0, 1.0, 1.0, centered, 1e-8, True)
