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
_OWN = {"contrastive-own": (8192, None, 128, "euclidean")}
_BANK = {"contrastive-bank": (256, 65536, 512, "sqeuclidean")}
_ODD = {"contrastive-odd": (333, None, 37, "cosine")}


def variants(arch: Arch, forward: Callable[..., Any]) -> Iterator[AotVariant]:
    return variants_of(
        arch,
        partial(_call, forward),
        everywhere={"fp32": _BANK, "bf16": _OWN},
        extra={"fp32": _OWN | _ODD, "bf16": _BANK, "fp16": _OWN, "tf32": _BANK},
    )


def _call(
    forward: Callable[..., Any], dtype: torch.dtype, B: int, M: int | None, D: int, distance: str
) -> None:
    x, y = labelled(B, D, dtype)
    r, r_y = (x, y) if M is None else labelled(M, D, dtype)
    forward(x, y, r, r_y, M is None, 1.0, distance, True, True)
