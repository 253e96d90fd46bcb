# SPDX-License-Identifier: Apache-2.0
"""What the OpInfos of losses of a student and a teacher [B, D] share: refused inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kdkernels.testing.opinfo import BadInput


def bad(
    name: str, args: tuple[Any, ...], error: type[Exception], message: str, **kwargs: Any
) -> BadInput:
    return BadInput(name, args, kwargs, error, message)


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x = torch.ones(8, 4, device=device)
    floats = "must be float16, bfloat16, float32 or float64"
    yield bad("rows", (x, x[:7]), ValueError, "teacher must have 8 rows like student, got 7")
    yield bad("one_dim", (x[0], x[0]), ValueError, "student must have at least 2 dimensions")
    yield bad("dims", (x, x[None]), ValueError, "teacher must have 2 dimensions, got shape [1, 8")
    yield bad("integer", (x.long(), x), TypeError, f"student {floats}, got torch.int64")
    yield bad("not_tensor", (x, [[1.0]]), TypeError, "teacher must be a torch.Tensor, got list")
    yield bad("devices", (x, x.to("meta")), ValueError, f"teacher must be on {x.device} like stud")
    yield bad("backend", (x, x), ValueError, "backend must be one of", backend="gpu")
