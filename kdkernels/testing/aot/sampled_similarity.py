# SPDX-License-Identifier: Apache-2.0
"""Calls of sampled_similarity that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch

from kdkernels.testing.aot.recorder import Calls
from kdkernels.triton.sampled_similarity import sampled_similarity_bwd, sampled_similarity_fwd

# label -> B, K, D, N
_CORE = {"crd": (64, 16385, 128, 50000)}
_MORE = {"odd": (33, 101, 37, 1000)}

EVERYWHERE: Calls = {"fp32": _CORE}
EXTRA: Calls = {"bf16": _MORE}


def call(
    dtype: torch.dtype,
    B: int,
    K: int,
    D: int,
    N: int,
) -> None:
    x, bank = (torch.empty(rows, D, dtype=dtype, device="meta") for rows in (B, N))
    indices = torch.empty(B, K, dtype=torch.int64, device="meta")
    sampled_similarity_bwd(sampled_similarity_fwd(x, bank, indices), x, bank, indices)
