# SPDX-License-Identifier: Apache-2.0
"""A driver for Triton that takes launches for an H200 and drops them, where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget


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

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
