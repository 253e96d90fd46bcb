# SPDX-License-Identifier: Apache-2.0
"""What the launchers of all ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import _gpu, _native


def ieee() -> bool:
    """Whether fp32 features are multiplied as they are, not in pieces of tf32."""
    return _gpu.fp32_matmul() == "highest"


def refuse_shared(first: Tensor, kib: int, what: str) -> str | None:
    """Why blocks that need more shared memory than every GPU has cannot run; None if they can."""
    if first.is_cuda:
        found = torch.cuda.get_device_properties(first.device).shared_memory_per_block_optin // 1024
    else:
        found = _native.cuda_host_shared_kib()
    if kib <= found:
        return None
    return f"{what} need {kib} KiB of shared memory, and this GPU gives a block {found}"
