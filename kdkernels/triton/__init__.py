# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NVIDIA and AMD GPUs; under Triton's interpreter they also run on the CPU."""

from __future__ import annotations

import importlib.util

from torch import Tensor


def unavailable() -> str | None:
    """Why the kernels cannot be used in this installation; None if they can."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def rejects(tensors: list[Tensor]) -> str | None:
    """Why these tensors cannot be handled; None if they can."""
    return None
