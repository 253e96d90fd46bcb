# SPDX-License-Identifier: Apache-2.0
"""Calls of triplet_all that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch

from kdkernels.testing.aot.recorder import Calls, labelled_rows
from kdkernels.triton.triplet_all import triplet_all_fwd

# label -> B, M or None for the batch itself, D, negatives, soft, distance, exclude or not
_IN_BATCH = {"triplet_all-in_batch": (8192, None, 128, "all", False, "euclidean")}
_BANK = {"triplet_all-bank": (256, 65536, 512, "semihard", True, "sqeuclidean")}
_EXCLUDE = {"triplet_all-exclude": (256, 65536, 512, "all", False, "euclidean", True)}
_MORE = {
    "triplet_all-soft": (8192, None, 128, "all", True, "sqeuclidean"),
    "triplet_all-semihard": (8192, None, 128, "semihard", False, "cosine"),
    "triplet_all-odd": (333, None, 37, "all", False, "euclidean"),
}

EVERYWHERE: Calls = {"fp32": _BANK | _EXCLUDE, "bf16": _IN_BATCH}
EXTRA: Calls = {"fp32": _IN_BATCH | _MORE, "bf16": _BANK, "fp16": _IN_BATCH, "tf32": _BANK}


def call(
    dtype: torch.dtype,
    B: int,
    M: int | None,
    D: int,
    negatives: str,
    soft: bool,
    distance: str,
    excludes: bool = False,
) -> None:
    x, y = labelled_rows(B, D, dtype)
    r, r_y = (x, y) if M is None else labelled_rows(M, D, dtype)
    rows = x, y, r, r_y, M is None, y if excludes else None
    # rows as they are in 16 bits, which tensor cores multiply; unit rows are fp32
    normalize = dtype == torch.float32
    triplet_all_fwd(*rows, normalize, negatives, 0.2, soft, distance, True, True)
