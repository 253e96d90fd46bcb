# SPDX-License-Identifier: Apache-2.0
"""Calls of contrastive that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch

from kdkernels.testing.aot.recorder import Calls, labelled_rows
from kdkernels.triton.contrastive import contrastive_fwd

# label -> B, M or None for the batch itself, D, distance, exclude or not
_IN_BATCH = {"contrastive-in_batch": (8192, None, 128, "euclidean")}
_BANK = {"contrastive-bank": (256, 65536, 512, "sqeuclidean")}
_EXCLUDE = {"contrastive-exclude": (256, 65536, 512, "euclidean", True)}
_ODD = {"contrastive-odd": (333, None, 37, "cosine")}

EVERYWHERE: Calls = {"fp32": _BANK | _EXCLUDE, "bf16": _IN_BATCH}
EXTRA: Calls = {"fp32": _IN_BATCH | _ODD, "bf16": _BANK, "fp16": _IN_BATCH, "tf32": _BANK}


def call(
    dtype: torch.dtype, B: int, M: int | None, D: int, distance: str, excludes: bool = False
) -> None:
    x, y = labelled_rows(B, D, dtype)
    r, r_y = (x, y) if M is None else labelled_rows(M, D, dtype)
    exclude = y if excludes else None
    # rows as they are in 16 bits, which tensor cores multiply; unit rows are fp32
    normalize = dtype == torch.float32
    contrastive_fwd(x, y, r, r_y, M is None, exclude, normalize, 1.0, distance, True, True)
