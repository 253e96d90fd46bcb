# SPDX-License-Identifier: Apache-2.0
"""Calls of gram_mse that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels.testing.aot.recorder import Calls
from kdkernels.triton.gram_mse import gram_mse_bwd, gram_mse_fwd

# label -> B, D, options of the operator, gradients needed. `_CORE` launches every kernel.
_CORE = {
    "resident-feature": (256, 25088, ("feature", "linear", 0.4, 2, "resident"), (True, False)),
    "streamed-row_l1": (4096, 512, ("row_l1", "linear", 0.4, 2, "streamed"), (True, True)),
    "factored-row_l2": (8192, 512, ("row_l2", "linear", 0.4, 2, "factored"), (True, False)),
}
_MORE = {
    "resident-row_l2": (256, 25088, ("row_l2", "linear", 0.4, 2, "resident"), (True, False)),
    "streamed-taylor": (4096, 512, ("feature", "rbf_taylor", 0.4, 2, "streamed"), (True, False)),
    "factored-feature": (8192, 512, ("feature", "linear", 0.4, 2, "factored"), (True, False)),
}

# without tf32 no kernel takes factors of fp32 features
_FP32 = {label: call for label, call in _CORE.items() if not label.startswith("factored")}

EVERYWHERE: Calls = {"bf16": _CORE, "fp32": _FP32}
EXTRA: Calls = {"bf16": _MORE, "fp16": _CORE, "tf32": _CORE}


def call(
    dtype: torch.dtype,
    B: int,
    D: int,
    options: tuple[Any, ...],
    need: tuple[bool, bool],
) -> None:
    """Student and teacher of one width."""
    student, teacher = (torch.empty((1, B, D), dtype=dtype, device="meta") for _ in range(2))
    _, *residuals = gram_mse_fwd(student, teacher, *options)
    gram_mse_bwd(torch.empty((1,), device="meta"), student, teacher, *residuals, *need, *options)
