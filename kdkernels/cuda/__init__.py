# SPDX-License-Identifier: Apache-2.0
"""C++/CUDA kernels for NVIDIA GPUs, in `libkdkernels_cuda.so`; the tests run the same kernels on
the CPU (docs/cuda.md)."""

from __future__ import annotations

from torch import Tensor

from kdkernels import _native
from kdkernels._gpu import refuse_device


def unavailable() -> str | None:
    """Why the library cannot be used in this installation; None if it is loaded."""
    return _native.cuda_load_error()


def rejects(tensors: list[Tensor]) -> str | None:
    """Why these tensors cannot be handled; None if they can."""
    on_host = bool(_native.cuda_host_library())
    wanted = "cpu" if on_host else "cuda"
    for tensor in tensors:
        if tensor.device.type != wanted:
            where = ", where KDKERNELS_CUDA_HOST runs it" if on_host else ""
            return f"its tensors must be on {wanted}{where}, got {tensor.device}"
    return None if on_host else refuse_device(tensors[0].device)
