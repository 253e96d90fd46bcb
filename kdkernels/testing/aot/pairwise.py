# SPDX-License-Identifier: Apache-2.0
"""Calls of pairwise that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.testing.aot.recorder import Calls
from kdkernels.triton.pairwise import pairwise_bwd, pairwise_fwd

# label -> N, M or None for the rows themselves, D, metric, whether y needs a gradient
_CORE = {"pairwise-in_batch": (4096, None, 256, "euclidean", False)}
_MORE = {
    "pairwise-bank": (256, 65536, 512, "cosine", False),
    "pairwise-odd_in_batch": (333, None, 37, "euclidean", False),
    "pairwise-odd": (333, 101, 37, "rbf", True),
}

EVERYWHERE: Calls = {"fp32": _CORE, "bf16": _CORE}
EXTRA: Calls = {"bf16": _MORE, "fp16": _CORE, "tf32": _CORE}


def call(
    dtype: torch.dtype,
    N: int,
    M: int | None,
    D: int,
    metric: str,
    need_y: bool,
) -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y = meta(N, D), None if M is None else meta(M, D)
    out = pairwise_fwd(x, y, metric, 1.0)
    pairwise_bwd(out, x, y, None if metric == "cosine" else out, metric, 1.0, True, need_y)
