# SPDX-License-Identifier: Apache-2.0
"""The memory of tensors, for files and digests (without NumPy, which torch does not need)."""

from __future__ import annotations

import ctypes

from torch import Tensor


def raw_bytes(x: Tensor) -> ctypes.Array[ctypes.c_uint8]:
    """The memory of a contiguous CPU tensor; valid while the tensor lives."""
    return (ctypes.c_uint8 * (x.numel() * x.itemsize)).from_address(x.data_ptr())
