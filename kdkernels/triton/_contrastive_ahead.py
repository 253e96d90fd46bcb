# SPDX-License-Identifier: Apache-2.0
"""Calls of contrastive that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kdkernels.triton._ahead import AotVariant, variants_of
from kdkernels.triton._common import Arch
from kdkernels.triton._triplet_ahead import _labelled as labelled

# label -> B, M or None for the batch itself, D, distance
_CORE = {
    "contrastive-own": (8192, None, 128, "euclidean"),
    "contrastive-bank": (256, 65536, 512, "sqeuclidean"),
}
_MORE = {"contrastive-odd": (333, None, 37, "cosine")}


def variants(arch: Arch, forward: Callable[..., Any]) -> Iterator[AotVariant]:
    return variants_of(
        arch,
        partial(_call, forward),
        everywhere={"fp32": _CORE, "bf16": _CORE},
        extra={"fp32": _MORE, "fp16": _CORE, "tf32": _CORE},
    )


def _call(
    forward: Callable[..., Any], dtype: torch.dtype, B: int, M: int | None, D: int, distance: str
) -> None:
    x, y = labelled(B, D, dtype)
    r, r_y = (x, y) if M is None else labelled(M, D, dtype)
    forward(x, y, r, r_y, M is None, 1.0, distance, True, True)
