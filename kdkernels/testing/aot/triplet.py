# SPDX-License-Identifier: Apache-2.0
"""Calls of triplet that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch

from kdkernels.testing.aot.recorder import Calls, labelled_rows
from kdkernels.triton.triplet import triplet_bwd, triplet_fwd

# label -> B, M or None for the batch itself, D, positives, negatives, distance, exclude or not
_IN_BATCH = {"in_batch": (8192, None, 128, "hardest", "hardest", "euclidean")}
_SEMIHARD = {"semihard": (8192, None, 512, "hardest", "semihard", "euclidean")}
_EXCLUDE = {"bank-exclude": (256, 65536, 512, "hardest", "semihard", "euclidean", True)}
_MORE = {
    "bank": (256, 65536, 512, "easiest", "easiest", "cosine"),
    "bank-semihard": (256, 65536, 512, "semihard", "hardest", "sqeuclidean"),
    "odd": (333, None, 37, "hardest", "hardest", "euclidean"),
}

EVERYWHERE: Calls = {"fp32": _SEMIHARD | _EXCLUDE, "bf16": _IN_BATCH}
EXTRA: Calls = {"fp32": _IN_BATCH | _MORE, "bf16": _SEMIHARD, "fp16": _IN_BATCH, "tf32": _SEMIHARD}


def call(
    dtype: torch.dtype,
    B: int,
    M: int | None,
    D: int,
    positives: str,
    negatives: str,
    distance: str,
    excludes: bool = False,
) -> None:
    in_batch = M is None
    x, y = labelled_rows(B, D, dtype)
    r, r_y = (x, y) if M is None else labelled_rows(M, D, dtype)
    exclude = y if excludes else None
    soft, normalize = positives == "easiest", D != 37
    strategies = positives, negatives
    options = 0.2, soft, distance
    total, _, _, losses, *residuals = triplet_fwd(
        x, y, r, r_y, in_batch, exclude, normalize, *strategies, *options
    )
    dloss = losses if soft else total
    triplet_bwd(dloss, x, r, *residuals, in_batch, normalize, True, True, *options)
