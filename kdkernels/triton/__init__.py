# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NVIDIA and AMD GPUs; under Triton's interpreter they also run on the CPU.

Importing this package does not import triton; its modules do.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from torch import Tensor

OLDEST = (3, 6)


def unavailable() -> str | None:
    """Why the kernels cannot be used in this installation; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton could not be imported: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST))}"
    return None


@cache
def _launch() -> ModuleType:
    return importlib.import_module("kdkernels.triton.common.launch")


def rejects(tensors: list[Tensor]) -> str | None:
    """Why these tensors cannot be handled; None if they can."""
    launch = _launch()
    for kind in sorted({tensor.device.type for tensor in tensors}):
        if kind == "cpu" and not launch.INTERPRETED.value:
            return (
                "tensors on the CPU need Triton's interpreter: "
                "set TRITON_INTERPRET=1 before triton is imported"
            )
        if kind not in ("cpu", "cuda"):
            return f"Triton kernels run on CUDA and ROCm devices, not on {kind}"
    return launch.refuse_arch(launch.arch_of(tensors[0]))
