# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled libraries, once, on first use, keeping the reason of a failure.

Importing kdkernels loads no native code. `libkdkernels_cpu.so` is built on the stable ABI of
LibTorch and registers raw operators in the namespace `kdkernels_C`; `_C` is a pybind11 module for
what is not a tensor operator.
"""

from __future__ import annotations

import importlib
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
        return (
            f"{path.name} was not built (it needs a C++ compiler, cmake, ninja, pybind11 and "
            "`pip install --no-build-isolation`)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


@cache
def build_module() -> ModuleType | str:
    """The pybind11 module `kdkernels._C`, or why it is missing."""
    try:
        return importlib.import_module("kdkernels._C")
    except ImportError as error:
        return f"kdkernels._C could not be imported: {error}"
