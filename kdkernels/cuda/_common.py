# SPDX-License-Identifier: Apache-2.0
"""What the launchers of all ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import _gpu, _native
from kdkernels._similarity import unit, unit_gradient


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


def unit_rows(
    x: Tensor,  # [B, D]
    r: Tensor,  # [M, D]
    in_batch: bool,
) -> tuple[Tensor, Tensor]:
    """Both sides divided by their norms, in fp32; one side where the references are the rows."""
    x = unit(x.float())
    return x, x if in_batch else unit(r.float())


def given_rows_gradients(
    rows: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of rows from those of `unit_rows`; [0] stays."""
    return tuple(
        du if du.dim() == 1 else unit_gradient(x, du) for x, du in zip(rows, gradients, strict=True)
    )
