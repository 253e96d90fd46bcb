# SPDX-License-Identifier: Apache-2.0
"""Calls of lsh_bce that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch

from kdkernels.testing.aot.recorder import Calls
from kdkernels.triton.lsh_bce import lsh_bce_bwd, lsh_bce_encode, lsh_bce_fwd

# label -> B, D, N, whether there are a bias and a mask, gradients of student, weight and bias.
_POOLED = {"pooled": (4096, 512, 2048, False, (True, False, False))}
_TRAINED = {"trained": (4096, 512, 2048, True, (True, True, True))}
_MORE = {
    "resnet50": (64, 2048, 65536, True, (True, False, False)),
    "odd": (333, 37, 101, True, (False, False, True)),
}

EVERYWHERE: Calls = {"bf16": _TRAINED, "fp32": _POOLED}
EXTRA: Calls = {"bf16": _POOLED | _MORE, "fp32": _TRAINED, "fp16": _TRAINED, "tf32": _POOLED}


def call(
    dtype: torch.dtype,
    B: int,
    D: int,
    N: int,
    optional: bool,
    need: tuple[bool, bool, bool],
) -> None:
    student, weight, bias = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((B, D), (N, D), (N,))
    )
    mask = torch.empty(B, dtype=torch.bool, device="meta")
    extras = (bias, mask) if optional else (None, None)
    codes = lsh_bce_encode(student, weight, extras[0])
    loss, dloss = lsh_bce_fwd(student, codes, weight, *extras, need[0])
    lsh_bce_bwd(torch.empty_like(loss), student, codes, weight, *extras, dloss, *need)
