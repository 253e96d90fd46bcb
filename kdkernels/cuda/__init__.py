# SPDX-License-Identifier: Apache-2.0
"""C++/CUDA kernels for NVIDIA GPUs, in `libkdkernels_cuda.so`; the tests run the same kernels on
the CPU (docs/cuda.md)."""

from __future__ import annotations

from torch import Tensor

from kdkernels import _native


def unavailable() -> str | None:
    """Why the library cannot be used in this installation; None if it is loaded."""
    return _native.cuda_load_error()


def rejects(tensors: list[Tensor]) -> str | None:
    """Why these tensors cannot be handled; None if they can."""
    wanted = "cpu" if _native.cuda_host_library() else "cuda"
    for tensor in tensors:
        if tensor.device.type != wanted:
            on_host = ", where KDKERNELS_CUDA_HOST runs it" if wanted == "cpu" else ""
            return f"its tensors must be on {wanted}{on_host}, got {tensor.device}"
    return None
