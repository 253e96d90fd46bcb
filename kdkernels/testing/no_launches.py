# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels for a GPU that need not be here: a driver takes and drops them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from kdkernels import _dispatch
from kdkernels.triton.common.launch import Arch, assume_arch

H200 = GPUTarget("cuda", 90, 32)


class _Utils:
    """What the JIT asks of a device."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        """module, function, registers, spills, most threads"""
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32,
            "max_num_regs": 65536,
        }  # fmt: skip


class _Launcher:
    """Takes the place of the C function that hands a kernel to the device."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


class Driver:
    """`triton.runtime.driver.driver.set_active(Driver())` lets it take all launches."""

    utils = _Utils()
    launcher_cls = _Launcher

    def __init__(self, target: GPUTarget = H200) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _accept(*_: Any) -> None:
    """In place of a refusal; a mock would take a tenth of the time of a step."""


@contextlib.contextmanager
def cpu_tensors_for(arch: Arch) -> Iterator[None]:
    """Triton's launchers take tensors on the CPU, configured for a GPU."""
    package = importlib.import_module("kdkernels.triton")
    _dispatch.implementation.cache_clear()
    with mock.patch.object(package, "rejects", _accept), assume_arch(arch):
        yield
    _dispatch.implementation.cache_clear()
