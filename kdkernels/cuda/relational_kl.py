# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/relational_kl/relational_kl_cuda.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import refuse_fp64
from kdkernels.cuda._common import ieee

_ops = torch.ops.kdkernels_cuda


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    first = args[0]  # the student, or the gradient of its loss
    if any(getattr(x, "dtype", None) == torch.bool for x in args):
        return "its kernels exclude one key per row, by index, and take no mask"
    return refuse_fp64(first)


def relational_kl_fwd(*args: Any) -> tuple[Tensor, ...]:
    return _ops.relational_kl_fwd(*args, ieee())


def relational_kl_bwd(*args: Any) -> tuple[Tensor, ...]:
    return _ops.relational_kl_bwd(*args, ieee())
