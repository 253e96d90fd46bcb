# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA kernels for the host (docs/cuda.md), and the device code that tests inspect."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "cpp"
BUILD = Path(__file__).parents[1] / "build" / "cuda-host"
VARIABLE = "KDKERNELS_CUDA_HOST"


@cache
def obstacle() -> str | None:
    """Why nothing can be built here; None if it can."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if not any(shutil.which(tool) for tool in (os.environ.get("CXX", "c++"), "g++")):
        missing.append("a C++ compiler")
    return f"{' and '.join(missing)} not found" if missing else None


def build(*targets: str) -> None:
    """Build targets of tests/cpp/CMakeLists.txt; what has not changed is not built again.

    Raises:
        RuntimeError: with the compiler's words.
    """
    configure = ["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja"]
    configure.append(f"-DKDK_TORCH_DIR={Path(torch.__file__).parent}")
    make = ["cmake", "--build", BUILD, "--parallel", "2", "--target", *targets]
    for command in (configure, make):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            output = (done.stdout + done.stderr)[-6000:]
            raise RuntimeError(f"building {', '.join(targets)} failed:\n{output}")


def library(name: str) -> Path:
    return BUILD / f"lib{name}.so"


def use() -> None:
    """Make the backend "cuda" of this process and its children run on the host, unless it has a
    GPU or was told what to load."""
    if torch.cuda.is_available() or VARIABLE in os.environ or obstacle() is not None:
        return
    build("kdkernels_cuda_plain")
    os.environ[VARIABLE] = str(library("kdkernels_cuda_plain"))
