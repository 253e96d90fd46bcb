# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled libraries, once, on first use, keeping the reason of a failure.

Importing kdkernels loads no native code. `libkdkernels_cpu.so` is built on the stable ABI of
LibTorch and registers raw operators in the namespace `kdkernels_C`; `libkdkernels_cuda.so` does
so in `kdkernels_cuda`; `_C` is a pybind11 module for what is not a tensor operator.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).parent


@cache
def load_error(library: str) -> str | None:
    """Load `lib<library>.so` and say why that was impossible; None once it is loaded."""
    path = _HERE / f"lib{library}.so"
    if not path.exists():
        compiler = "nvcc" if library == "kdkernels_cuda" else "a C++ compiler"
        return (
            f"{path.name} was not built (it needs {compiler}, cmake, ninja, pybind11 and "
            "`pip install --no-build-isolation`)"
        )
    return _load(path)


def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


def cuda_host_library() -> str | None:
    """The library that runs the CUDA kernels on the CPU, if this process was given one."""
    return os.environ.get("KDKERNELS_CUDA_HOST")


def cuda_host_shared_kib() -> int:
    """What that library gives a block of shared memory, by default as much as sm_80 does."""
    return int(os.environ.get("KDKERNELS_CUDA_HOST_SHARED_KIB", "163"))


@cache
def cuda_load_error() -> str | None:
    """Load the CUDA kernels, or those that `KDKERNELS_CUDA_HOST` names, and say why that was
    impossible; None once they are loaded.

    A torch without CUDA lacks what the library links to, so it is loaded where there is a GPU only.
    """
    host = cuda_host_library()
    if host is not None:
        return _load(Path(host))
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return load_error("kdkernels_cuda")


@cache
def build_module() -> ModuleType | str:
    """The pybind11 module `kdkernels._C`, or why it is missing."""
    try:
        return importlib.import_module("kdkernels._C")
    except ImportError as error:
        return f"kdkernels._C could not be imported: {error}"
