# SPDX-License-Identifier: Apache-2.0
"""Builds the native libraries by CMake and Ninja where that is possible; the package works without
them.

Environment: KDKERNELS_NATIVE=0 skips the native build, =1 makes its failure an error (default:
build if there is a compiler, and say so if it does not work). KDKERNELS_CUDA=0 leaves out the CUDA
library, which is otherwise built if nvcc is found. KDKERNELS_CUDA_ARCHITECTURES names what for, as
CMAKE_CUDA_ARCHITECTURES does (default: 80-real;90-real;100, or 80 alone for a development build).
KDKERNELS_WERROR=1 treats compiler warnings as errors.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def obstacle() -> str | None:
    """Why the native libraries cannot be built here; None if they can."""
    if os.environ.get("KDKERNELS_NATIVE") == "0":
        return "KDKERNELS_NATIVE=0"
    for module in ("torch", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return (
                f"the Python package {module} is not installed (with pip use --no-build-isolation)"
            )
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} was not found"
    if not any(
        shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")
    ):
        return "no C++ compiler was found"
    return None


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries; setuptools sees them as one extension."""

    def run(self) -> None:
        reason = obstacle()
        if reason is not None:
            if os.environ.get("KDKERNELS_NATIVE") == "1":
                raise RuntimeError(
                    f"KDKERNELS_NATIVE=1, but the native libraries cannot be built: {reason}"
                )
            print(f"kdkernels: native libraries are not built: {reason}", file=sys.stderr)
            return
        import pybind11
        import torch

        # an in-place build is kept apart, since others are for other GPUs
        kept = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build = kept if self.inplace else Path(self.build_temp).resolve() / "cmake"
        target = (
            ROOT / "kdkernels" if self.inplace else Path(self.build_lib).resolve() / "kdkernels"
        )
        definitions = {
            "CMAKE_INSTALL_PREFIX": target,
            "KDK_TORCH_DIR": Path(torch.__file__).parent,
            "KDK_TORCH_VERSION": torch.__version__,
            "KDK_CUDA": "OFF" if os.environ.get("KDKERNELS_CUDA") == "0" else "ON",
            "KDK_CUDA_ARCHITECTURES": os.environ.get(
                "KDKERNELS_CUDA_ARCHITECTURES", "80" if self.inplace else "80-real;90-real;100"
            ),
            "KDK_WERROR": "ON" if os.environ.get("KDKERNELS_WERROR") == "1" else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        arguments = [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *arguments], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "install"], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("kdkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
