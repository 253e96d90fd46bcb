# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/gram_mse/gram_mse_cuda.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import refuse_fp64
from kdkernels.cuda._common import ieee, refuse_shared

_ops = torch.ops.kdkernels_cuda
PAIR_KIB = 128  # of shared memory, kPairSharedBytes of csrc/gram_mse/gram_mse_streamed.cu


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    if args[-1] == "factored":
        return "its kernels are those of algorithm='tiled', and the factored one was chosen"
    first = args[0]  # the student, or the gradient of its loss
    return refuse_fp64(first) or (
        refuse_shared(first, PAIR_KIB, "blocks that hold a tile of both Grams")
        if args[-1] == "streamed"
        else None
    )


def gram_mse_fwd(*args: Any) -> tuple[Tensor, ...]:
    return _ops.gram_mse_fwd(*args, ieee())


def gram_mse_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    return _ops.gram_mse_bwd(*args, ieee())
