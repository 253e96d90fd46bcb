# SPDX-License-Identifier: Apache-2.0
"""C++ kernels for the CPU, in `libkdkernels_cpu.so`.

The library registers its operators under the names of the launchers, so there is no module per op:
an op has a CPU kernel exactly where `kdkernels_C::<op>_fwd` is registered.
"""

from __future__ import annotations

from typing import Any

import torch
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


class _Launchers:
    """The operators of an op as attributes, each of them looked up at its first use."""

    def __getattr__(self, name: str) -> Any:
        launcher = getattr(torch.ops.kdkernels_C, name).default
        setattr(self, name, launcher)
        return launcher


def launchers(op: str) -> Any | None:
    """What holds `<op>_fwd` and the op's other operators; None where the library has no such op."""
    return _Launchers() if hasattr(torch.ops.kdkernels_C, f"{op}_fwd") else None
