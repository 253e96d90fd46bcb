# SPDX-License-Identifier: Apache-2.0
"""Calls of pkt that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch

from kdkernels.testing.aot.recorder import Calls
from kdkernels.triton.pkt import pkt_fwd

# label -> B, D, kernel, divergence
_COSINE = {"cosine": (4096, 128, "cosine", "kl")}
_STUDENT_T = {"student_t": (4096, 128, "student_t", "jeffreys")}
_ODD = {"odd": (333, 37, "cosine", "jeffreys")}

EVERYWHERE: Calls = {"bf16": _STUDENT_T, "fp32": _COSINE}
EXTRA: Calls = {"bf16": _COSINE | _ODD, "fp16": _COSINE}


def call(dtype: torch.dtype, B: int, D: int, kernel: str, divergence: str) -> None:
    student, teacher = (torch.empty(B, D, dtype=dtype, device="meta") for _ in range(2))
    pkt_fwd(student, teacher, kernel, divergence, True)
