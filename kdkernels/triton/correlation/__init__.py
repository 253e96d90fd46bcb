# SPDX-License-Identifier: Apache-2.0
"""correlation on Triton: the operator and its launches.

Logits are fp16, bf16 or fp32; everything else is fp32, and sums over rows and columns are fp64.
Nothing waits for the device, and torch adds no kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.triton.common.launch import arch_of, cdiv, on_device, supports
from kdkernels.triton.correlation import kernels
from kdkernels.triton.correlation.config import BLOCK, NUM_WARPS, pick_config

__all__ = ["correlation_fwd", "supports"]


def correlation_fwd(
    student: Tensor,  # [B, C]
    teacher: Tensor,  # [B, C]
    temperature: float,
    row_weight: float,
    column_weight: float,
    centered: bool,
    eps: float,
    need_student: bool,
) -> tuple[Tensor, Tensor]:
    (B, C), fp32 = student.shape, {"dtype": torch.float32, "device": student.device}
    dz = torch.empty((B, C) if need_student else (0,), **fp32)
    if student.numel() == 0:
        return torch.zeros((), **fp32), dz
    config = pick_config(B, C, arch=arch_of(student))
    splits = cdiv(B, config.split_m)
    rows, loss = torch.empty((7, B), **fp32), torch.empty((), **fp32)
    moments, columns = torch.empty((splits, 5, C), **fp32), torch.empty((5, C), **fp32)
    sides: dict[str, Any] = {
        "s_ptr": student, "t_ptr": teacher, "rows_ptr": rows, "B": B, "C": C,
        "temperature": temperature,
        "stride_sc": student.stride(1), "stride_tc": teacher.stride(1), "num_warps": NUM_WARPS,
    }  # fmt: skip
    along = {**sides, "stride_sm": student.stride(0), "stride_tm": teacher.stride(0)}
    by_row = dict(zip(("BLOCK_M", "BLOCK_C"), config.by_row, strict=True))
    by_column = dict(zip(("BLOCK_M", "BLOCK_C"), config.by_column, strict=True))
    row_tiles, column_tiles = cdiv(B, by_row["BLOCK_M"]), cdiv(C, by_column["BLOCK_C"])
    centre = 1 / C if centered else 0.0
    with on_device(student):
        kernels._correlation_rows_kernel[(row_tiles,)](**along, **by_row, centre=centre, eps=eps)
        kernels._correlation_columns_kernel[(column_tiles, splits)](
            **along, **by_column, moments_ptr=moments, split_m=config.split_m, CENTERED=centered
        )
        kernels._correlation_merge_kernel[(column_tiles,)](
            **sides, moments_ptr=moments, columns_ptr=columns, eps=eps, split_m=config.split_m,
            splits=splits, CENTERED=centered, BLOCK_C=by_column["BLOCK_C"],
        )  # fmt: skip
        # temperature^2 of the loss, 1 / temperature of the softmax
        kernels._correlation_gradient_kernel[(row_tiles if need_student else 1,)](
            **along, **by_row, columns_ptr=columns, dz_ptr=dz, loss_ptr=loss, centre=centre,
            row_scale=temperature * row_weight / B, column_scale=temperature * column_weight / C,
            DERIVATIVE=need_student, BLOCK=BLOCK,
        )  # fmt: skip
    return loss, dz
