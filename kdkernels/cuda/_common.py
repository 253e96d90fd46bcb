# SPDX-License-Identifier: Apache-2.0
"""What the launchers of all ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import _gpu
from kdkernels._similarity import unit, unit_gradient


def ieee() -> bool:
    """Whether fp32 features are multiplied as they are, not in pieces of tf32."""
    return _gpu.fp32_matmul() == "highest"


# Of shared memory, that the largest blocks of csrc need (kMostSharedBytes). GPUs of compute
# capability 8.6, 8.9 and 12 have 99, those of data centres at least 163.
_MOST_KIB = 128


def too_small(first: Tensor) -> str | None:
    """Why the largest blocks do not fit a GPU; None if they do."""
    if not first.is_cuda:
        return None
    kib = torch.cuda.get_device_properties(first.device).shared_memory_per_block_optin // 1024
    if kib < _MOST_KIB:
        return f"a block needs {_MOST_KIB} KiB of shared memory, and this GPU has {kib}"
    return None


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
