# SPDX-License-Identifier: Apache-2.0
"""lsh_bce on Triton: the operators and their launches.

Configurations and kernels are in the modules `_lsh_bce_*` beside this one. Features are fp16, bf16
or fp32; products accumulate in fp32. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.launch import arch_of, cdiv, given, on_device, supports
from kdkernels.triton.common.product import multiply
from kdkernels.triton.lsh_bce import kernels
from kdkernels.triton.lsh_bce.config import ELEMENTS, LshBceConfig, pick_config

__all__ = ["lsh_bce_bwd", "lsh_bce_encode", "lsh_bce_fwd", "supports"]


def lsh_bce_encode(
    features: Tensor,  # [B, D]
    weight: Tensor,  # [N, D]
    bias: Tensor | None,  # [N]
) -> Tensor:
    (B, D), N = features.shape, weight.shape[0]
    codes = features.new_empty((B, cdiv(N, 8)), dtype=torch.uint8)
    if codes.numel() == 0:
        return codes
    config = _config(features)
    tile = config.project
    with on_device(features):
        kernels._lsh_bce_encode_kernel[(tile.count(B, N),)](
            x_ptr=features, w_ptr=weight, b_ptr=given(bias, features),
            codes_ptr=codes, B=B, N=N, D=D,
            stride_xm=features.stride(0), stride_xd=features.stride(1),
            stride_wn=weight.stride(0), stride_wd=weight.stride(1),
            stride_b=0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None, PRECISION=config.precision, **tile.launch(),
        )  # fmt: skip
    return codes


def lsh_bce_fwd(
    student: Tensor,  # [B, D]
    codes: Tensor,  # [B, ceil(N / 8)]
    weight: Tensor,  # [N, D]
    bias: Tensor | None,  # [N]
    sample_mask: Tensor | None,  # [B]
    need_student: bool,
) -> tuple[Tensor, Tensor]:
    (B, D), N = student.shape, weight.shape[0]
    fp32 = {"dtype": torch.float32, "device": student.device}
    if B == 0 or N == 0:
        return torch.zeros(B, **fp32), torch.zeros((B, D) if need_student else (0,), **fp32)
    config = _config(student)
    partial = torch.empty((cdiv(N, config.project.n), B), **fp32)
    dloss = torch.empty((B, D) if need_student else (0,), **fp32)
    row_bytes = N * student.itemsize if need_student else 0
    step = config.chunk(B, row_bytes, config.project.m)
    with on_device(student):
        mask = _loadable(sample_mask)
        dz = student.new_empty((step, N)) if need_student else None
        for first in range(0, B, step):
            rows = slice(first, min(first + step, B))
            keep = None if mask is None else mask[rows]
            derivatives = None if dz is None else dz[: rows.stop - first]
            _project(
                config, student[rows], codes[rows], weight, bias, keep,
                loss=partial[:, rows], dz=derivatives,
            )  # fmt: skip
            if derivatives is not None:
                _multiply(config, derivatives, weight, None, dloss[rows])
    return partial.sum(0) if len(partial) > 1 else partial[0], dloss


def lsh_bce_bwd(
    dout: Tensor,  # [B]
    student: Tensor,  # [B, D]
    codes: Tensor,  # [B, ceil(N / 8)]
    weight: Tensor,  # [N, D]
    bias: Tensor | None,  # [N]
    sample_mask: Tensor | None,  # [B]
    dloss: Tensor,  # [B, D] or empty
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ds = student.new_empty(student.shape if need_student else (0,))
    dw = weight.new_empty(weight.shape if need_weight else (0,))
    db = weight.new_empty(weight.shape[:1] if need_bias else (0,))
    with on_device(student):
        if ds.numel() > 0:
            _scale(dout, dloss, ds)
        if student.shape[0] == 0:
            dw.zero_()
            db.zero_()
        elif dw.numel() + db.numel() > 0:
            _weight_gradients(dout, student, codes, weight, bias, sample_mask, dw, db)
    return ds, dw, db


def _weight_gradients(
    dout: Tensor,
    student: Tensor,
    codes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sample_mask: Tensor | None,
    dweight: Tensor,  # [N, D] or empty
    dbias: Tensor,  # [N] or empty
) -> None:
    """In chunks of directions, of which each row of dweight needs one only."""
    B, N = student.shape[0], weight.shape[0]
    config = _config(student)
    # fp16 could not hold what dout makes of a derivative
    dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    tile = config.project
    step = config.chunk(N, B * dtype.itemsize, tile.n)
    columns = torch.empty((cdiv(B, tile.m), N), dtype=torch.float32, device=student.device)
    dz = student.new_empty(B * step, dtype=dtype) if dweight.numel() > 0 else None
    mask = _loadable(sample_mask)
    for first in range(0, N, step):
        part = slice(first, min(first + step, N))
        count = part.stop - first
        derivatives = None if dz is None else dz[: B * count].view(B, count)
        sums = columns.view(-1)[: len(columns) * count].view(-1, count)
        _project(
            config, student, codes[:, first // 8 :], weight[part],
            None if bias is None else bias[part], mask,
            factor=dout, dz=derivatives, db=sums if dbias.numel() > 0 else None,
        )  # fmt: skip
        if derivatives is not None:
            _multiply(config, derivatives.T, student, mask, dweight[part])
        if dbias.numel() > 0:
            dbias[part] = sums.sum(0)


def _config(x: Tensor) -> LshBceConfig:
    return pick_config(
        x.shape[0], dtype=x.dtype, arch=arch_of(x),
        fp32_matmul=fp32_matmul(),
    )  # fmt: skip


def _loadable(sample_mask: Tensor | None) -> Tensor | None:
    """In 32 bits: a load of 8 bits on the way to a fp32 operand makes the compiler for sm_100
    (triton 3.7) multiply in tf32 whatever the precision that is asked for.
    """
    return None if sample_mask is None else sample_mask.to(torch.int32)


def _project(
    config: LshBceConfig,
    student: Tensor,  # [B, D]
    codes: Tensor,  # [B, at least ceil(N / 8)]
    weight: Tensor,  # [N, D]
    bias: Tensor | None,  # [N]
    keep: Tensor | None,  # [B]
    *,
    factor: Tensor | None = None,  # [B]
    loss: Tensor | None = None,  # [tiles of N, B], unit stride along B
    dz: Tensor | None = None,  # [B, N]
    db: Tensor | None = None,  # [tiles of B, N]
) -> None:
    (B, D), N = student.shape, weight.shape[0]
    tile = config.project

    def stride(x: Tensor | None) -> int:
        return 0 if x is None else x.stride(0)

    kernels._lsh_bce_project_kernel[(tile.count(B, N),)](
        s_ptr=student, codes_ptr=codes, w_ptr=weight, b_ptr=given(bias, codes),
        keep_ptr=given(keep, codes), factor_ptr=given(factor, codes),
        loss_ptr=given(loss, codes), dz_ptr=given(dz, codes), db_ptr=given(db, codes),
        B=B, N=N, D=D,
        stride_sm=student.stride(0), stride_sd=student.stride(1),
        stride_cm=codes.stride(0), stride_cn=codes.stride(1),
        stride_wn=weight.stride(0), stride_wd=weight.stride(1),
        stride_b=stride(bias), stride_keep=stride(keep), stride_factor=stride(factor),
        stride_loss=stride(loss),
        HAS_BIAS=bias is not None, HAS_MASK=keep is not None, HAS_FACTOR=factor is not None,
        LOSS=loss is not None, DZ=dz is not None, DB=db is not None,
        PRECISION=config.precision, **tile.launch(),
    )  # fmt: skip


def _multiply(
    config: LshBceConfig,
    a: Tensor,  # [M, K]
    x: Tensor,  # [K, N]
    keep: Tensor | None,  # [K], which rows of x are read
    out: Tensor,  # [M, N], contiguous
) -> None:
    multiply(config.product, config.arch, config.weights, a, x, out, keep=keep)


def _scale(
    dout: Tensor,  # [B]
    dloss: Tensor,  # [B, D]
    ds: Tensor,  # [B, D]
) -> None:
    kernels._lsh_bce_bwd_kernel_scale[(cdiv(ds.numel(), ELEMENTS),)](
        dout_ptr=dout, dloss_ptr=dloss.contiguous(), ds_ptr=ds, D=ds.shape[1], count=ds.numel(),
        stride_dout=dout.stride(0), BLOCK=ELEMENTS,
    )  # fmt: skip
