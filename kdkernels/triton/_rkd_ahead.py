# SPDX-License-Identifier: Apache-2.0
"""Calls of rkd that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kdkernels.triton._ahead import AotVariant, variants_of
from kdkernels.triton._common import Arch

# label -> B, D_s, D_t, relation
_DISTANCE = {"distance": (8192, 128, 512, "distance")}
_CORE = {**_DISTANCE, "angle": (1024, 512, 512, "angle")}
_MORE = {"angle-odd": (333, 37, 53, "angle")}


def variants(arch: Arch, forward: Callable[..., Any]) -> Iterator[AotVariant]:
    return variants_of(
        arch,
        partial(_call, forward),
        everywhere={"fp32": _CORE, "bf16": _DISTANCE},
        extra={"fp32": _MORE, "fp16": _DISTANCE, "tf32": _DISTANCE},
    )


def _call(
    forward: Callable[..., Any], dtype: torch.dtype, B: int, D_s: int, D_t: int, relation: str
) -> None:
    s, t = (torch.empty(B, D, dtype=dtype, device="meta") for D in (D_s, D_t))
    forward(s, t, relation, True, False)
