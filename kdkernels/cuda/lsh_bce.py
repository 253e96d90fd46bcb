# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/lsh_bce/lsh_bce_cuda.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.cuda._common import exact, too_narrow

_ops = torch.ops.kdkernels_cuda


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    return too_narrow(args[0])  # features, the student, or the gradient of its loss


def lsh_bce_encode(*args: Any) -> Tensor:
    return _ops.lsh_bce_encode(*args, exact())


def lsh_bce_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return _ops.lsh_bce_fwd(*args, exact())


def lsh_bce_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _ops.lsh_bce_bwd(*args, exact())
