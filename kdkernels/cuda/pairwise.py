# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/pairwise/pairwise_cuda.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.cuda._common import exact, too_narrow

_ops = torch.ops.kdkernels_cuda


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    return too_narrow(args[0])  # x, or the gradient of values in its dtype


def pairwise_fwd(*args: Any) -> Tensor:
    return _ops.pairwise_fwd(*args, exact())


def pairwise_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    return _ops.pairwise_bwd(*args, exact())
