# SPDX-License-Identifier: Apache-2.0
"""C++ kernels for the CPU, in `libkdkernels_cpu.so`."""

from __future__ import annotations

from torch import Tensor

from kdkernels import _native


def unavailable() -> str | None:
    """Why the library cannot be used in this installation; None if it is loaded."""
    return _native.load_error("kdkernels_cpu")


def rejects(tensors: list[Tensor]) -> str | None:
    """Why these tensors cannot be handled; None if they can."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"its tensors must be on the CPU, got {tensor.device}"
    return None
