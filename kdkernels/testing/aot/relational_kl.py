# SPDX-License-Identifier: Apache-2.0
"""Calls of relational_kl that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.testing.aot.recorder import Calls
from kdkernels.triton.relational_kl import relational_kl_bwd, relational_kl_fwd

# label -> B, D, E (None: shared keys, and own keys; 0: info_nce), K, whether norms are divided by,
# temperatures are tensors and some keys do not count, gradients of student, teacher and keys, and
# for info_nce whether a mask excludes keys and none is positive. `_CORE` launches every kernel.
_CORE = {"rrd": (1024, 128, None, 16384, True, (True, True, True))}
_FORWARD = {"rrd": (1024, 128, None, 16384, True, (True, False, False))}
_MORE = {
    "in_batch": (1024, 128, 0, 1024, True, (True, False, False)),
    "masked": (1024, 128, 0, 1024, True, (True, False, True), True),
    "odd": (333, 37, 53, 101, False, (True, False, True)),
}

EVERYWHERE: Calls = {"bf16": _CORE, "fp32": _CORE}
EXTRA: Calls = {"bf16": _MORE, "fp16": _CORE, "tf32": _FORWARD}


def call(
    dtype: torch.dtype,
    B: int,
    D: int,
    E: int | None,
    K: int,
    optional: bool,
    need: tuple[bool, bool, bool],
    masked: bool = False,
) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width = D if E is None else E
    has_teacher, two_banks, learned = width > 0, bool(E), meta() if optional else None
    index = meta(B, dtype=torch.int64)
    exclude = meta(B, K, dtype=torch.bool) if masked else index if has_teacher else None
    call = (
        meta(B, D, dtype=dtype),
        meta(B, width, dtype=dtype) if has_teacher else None,
        meta(K, D, dtype=dtype),
        meta(K, width, dtype=dtype) if two_banks else None,
        meta(B, D, dtype=dtype) if E is None else None,
        None if has_teacher or masked else index,
        exclude if optional else None,
        meta(dtype=torch.int64) if optional else None,
        learned,
        learned if has_teacher else None,
        optional,
        has_teacher,
    )
    student, teacher, keys = need
    residuals = relational_kl_fwd(*call, 0.1, 0.1, student)
    relational_kl_bwd(
        meta(B), *call, *residuals, student, teacher, keys, two_banks and keys,
        E is None and keys, student and optional, teacher and optional,
    )  # fmt: skip
