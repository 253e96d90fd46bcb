# SPDX-License-Identifier: Apache-2.0
"""What the launchers of all ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def exact() -> bool:
    """Whether fp32 features are multiplied as they are, not in pieces of tf32."""
    return torch.get_float32_matmul_precision() == "highest"


def too_narrow(first: Tensor) -> str | None:
    """Why features of a dtype cannot be handled; None if they can."""
    if first.dtype == torch.float64:
        return "its products accumulate in fp32, which is not enough for fp64 features"
    return None
