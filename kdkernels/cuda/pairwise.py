# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/pairwise/pairwise_cuda.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import refuse_fp64
from kdkernels.cuda._common import ieee

_ops = torch.ops.kdkernels_cuda


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    return refuse_fp64(args[0])  # x, or the gradient of values in its dtype


def pairwise_fwd(*args: Any) -> Tensor:
    return _ops.pairwise_fwd(*args, ieee())


def pairwise_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    return _ops.pairwise_bwd(*args, ieee())
