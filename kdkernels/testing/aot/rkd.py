# SPDX-License-Identifier: Apache-2.0
"""Calls of rkd that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch

from kdkernels.testing.aot.recorder import Calls
from kdkernels.triton.rkd import rkd_fwd

# label -> B, D_s, D_t, relation
_DISTANCE = {"distance": (8192, 128, 512, "distance")}
_CORE = {**_DISTANCE, "angle": (1024, 512, 512, "angle")}
_MORE = {"angle-odd": (333, 37, 53, "angle")}

EVERYWHERE: Calls = {"fp32": _CORE, "bf16": _DISTANCE}
EXTRA: Calls = {"fp32": _MORE, "fp16": _DISTANCE, "tf32": _DISTANCE}


def call(dtype: torch.dtype, B: int, D_s: int, D_t: int, relation: str) -> None:
    s, t = (torch.empty(B, D, dtype=dtype, device="meta") for D in (D_s, D_t))
    rkd_fwd(s, t, relation, True, False)
