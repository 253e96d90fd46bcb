# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/lsh_bce/lsh_bce_cuda.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import refuse_fp64
from kdkernels.cuda._common import ieee

_ops = torch.ops.kdkernels_cuda


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    return refuse_fp64(args[0])  # features, the student, or the gradient of its loss


def lsh_bce_encode(*args: Any) -> Tensor:
    return _ops.lsh_bce_encode(*args, ieee())


def lsh_bce_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return _ops.lsh_bce_fwd(*args, ieee())


def lsh_bce_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.lsh_bce_bwd(*args, ieee())
