# SPDX-License-Identifier: Apache-2.0
"""Calls of lsh_bce that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kdkernels.triton._ahead import AotVariant, variants_of
from kdkernels.triton._common import Arch

# label -> B, D, N, whether there are a bias and a mask, gradients of student, weight and bias.
_POOLED = {"pooled": (4096, 512, 2048, False, (True, False, False))}
_TRAINED = {"trained": (4096, 512, 2048, True, (True, True, True))}
_MORE = {
    "resnet50": (64, 2048, 65536, True, (True, False, False)),
    "odd": (333, 37, 101, True, (False, False, True)),
}


def variants(
    arch: Arch,
    encode: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
) -> Iterator[AotVariant]:
    return variants_of(
        arch,
        partial(_call, encode, forward, backward),
        everywhere={"bf16": _TRAINED, "fp32": _POOLED},
        extra={"bf16": _POOLED | _MORE, "fp32": _TRAINED, "fp16": _TRAINED, "tf32": _POOLED},
    )


def _call(
    encode: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
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
    codes = encode(student, weight, extras[0])
    loss, dloss = forward(student, codes, weight, *extras, need[0])
    backward(torch.empty_like(loss), student, codes, weight, *extras, dloss, *need)
