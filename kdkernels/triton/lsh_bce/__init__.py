# SPDX-License-Identifier: Apache-2.0
"""lsh_bce on Triton: the operators and their launches.

Configurations and kernels are in the modules beside this one. Features are fp16, bf16
or fp32; products accumulate in fp32. Nothing waits for the device.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.launch import arch_of, cdiv, given, on_device, supports
from kdkernels.triton.common.prepared import REMEMBERED, Launch
from kdkernels.triton.common.product import multiply, multiply_parts
from kdkernels.triton.lsh_bce import kernels
from kdkernels.triton.lsh_bce.config import ELEMENTS, LOSSES, PARTS, LshBceConfig, pick_config

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
    launch = _encoding(
        config, (B, N, D), (*features.stride(), *weight.stride()), _stride(bias)
    )  # fmt: skip
    with on_device(features):
        launch(x_ptr=features, w_ptr=weight, b_ptr=given(bias, features), codes_ptr=codes)
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
    tiles = cdiv(N, config.project.n)
    partial = torch.empty((tiles, B), **fp32)
    loss = torch.empty(B, **fp32) if tiles > 1 else partial[0]
    dloss = torch.empty((B, D) if need_student else (0,), **fp32)
    row_bytes = N * student.itemsize if need_student else 0
    step = config.chunk(B, row_bytes, config.project.m)
    with on_device(student):
        mask = _loadable(sample_mask)
        dz = student.new_empty((step, N)) if need_student else None
        for first in range(0, B, step):
            rows = None if step >= B else slice(first, min(first + step, B))
            derivatives = dz if dz is None or rows is None else dz[: rows.stop - first]
            sums = partial if rows is None else partial[:, rows]
            _project(
                config, _part(student, rows), _part(codes, rows), weight, bias, _part(mask, rows),
                loss=sums, dz=derivatives,
            )  # fmt: skip
            ds = _part(dloss, rows) if need_student else None
            parts = None
            if derivatives is not None and D > 0:
                parts = multiply_parts(
                    config.product, config.arch, config.weights, derivatives, weight, ds
                )
            _finish(sums, _part(loss, rows), parts, ds)
    return loss, dloss


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
            launch = _scaling(ds.numel(), ds.shape[1], dout.stride(0))
            launch(dout_ptr=dout, dloss_ptr=dloss.contiguous(), ds_ptr=ds)
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
            multiply(
                config.product, config.arch, config.weights, derivatives.T, student, dweight[part],
                keep=mask,
            )  # fmt: skip
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


def _part(x: Tensor | None, rows: slice | None) -> Tensor | None:
    """Some rows, or all of them."""
    return x if x is None or rows is None else x[rows]


def _stride(x: Tensor | None) -> int | None:
    return None if x is None else x.stride(0)


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
    launch = _projection(
        config, (len(student), *weight.shape),
        (*student.stride(), *codes.stride(), *weight.stride()),
        (_stride(bias), _stride(keep), _stride(factor), _stride(loss)),
        dz is not None, db is not None,
    )  # fmt: skip
    launch(
        s_ptr=student, codes_ptr=codes, w_ptr=weight, b_ptr=given(bias, codes),
        keep_ptr=given(keep, codes), factor_ptr=given(factor, codes), loss_ptr=given(loss, codes),
        dz_ptr=given(dz, codes), db_ptr=given(db, codes),
    )  # fmt: skip


def _finish(
    partial: Tensor,  # [tiles, B], unit stride along B
    loss: Tensor,  # [B]; one tile is the loss
    parts: Tensor | None,  # [splits, B, D]
    dloss: Tensor | None,  # [B, D], which the parts add up to
) -> None:
    """Adds what tiles of directions left, in one launch; none if there is nothing to add."""
    tiles, B = partial.shape
    splits, count = (1, 0) if parts is None else (len(parts), parts[0].numel())
    if tiles > 1 or splits > 1:
        _finishing(tiles, B, partial.stride(0), splits, count)(
            partial_ptr=partial, loss_ptr=loss, parts_ptr=given(parts, partial),
            dloss_ptr=given(dloss, partial) if splits > 1 else partial,
        )  # fmt: skip


@lru_cache(REMEMBERED)
def _encoding(
    config: LshBceConfig,
    sizes: tuple[int, int, int],  # B, N, D
    strides: tuple[int, ...],  # of features and weight
    stride_bias: int | None,
) -> Launch:
    B, N, D = sizes
    tile = config.project
    return Launch(
        kernels._lsh_bce_encode_kernel, (tile.count(B, N),), B=B, N=N, D=D, stride_xm=strides[0],
        stride_xd=strides[1], stride_wn=strides[2], stride_wd=strides[3],
        stride_b=stride_bias or 0, HAS_BIAS=stride_bias is not None, PRECISION=config.precision,
        **tile.launch(),
    )  # fmt: skip


@lru_cache(REMEMBERED)
def _projection(
    config: LshBceConfig,
    sizes: tuple[int, int, int],  # B, N, D
    strides: tuple[int, ...],  # of student, codes and weight
    optional: tuple[int | None, ...],  # strides of bias, keep, factor and loss
    has_dz: bool,
    has_db: bool,
) -> Launch:
    B, N, D = sizes
    tile = config.project
    bias, keep, factor, loss = optional
    return Launch(
        kernels._lsh_bce_project_kernel, (tile.count(B, N),), B=B, N=N, D=D, stride_sm=strides[0],
        stride_sd=strides[1], stride_cm=strides[2], stride_cn=strides[3], stride_wn=strides[4],
        stride_wd=strides[5], stride_b=bias or 0, stride_keep=keep or 0, stride_factor=factor or 0,
        stride_loss=loss or 0, HAS_BIAS=bias is not None, HAS_MASK=keep is not None,
        HAS_FACTOR=factor is not None, LOSS=loss is not None, DZ=has_dz, DB=has_db,
        PRECISION=config.precision, **tile.launch(),
    )  # fmt: skip


@lru_cache(REMEMBERED)
def _finishing(tiles: int, B: int, stride: int, splits: int, count: int) -> Launch:
    sums = cdiv(B, LOSSES) if tiles > 1 else 0
    elements = cdiv(count, ELEMENTS) if splits > 1 else 0
    return Launch(
        kernels._lsh_bce_finish_kernel, (sums + elements,), B=B, tiles=tiles, stride_partial=stride,
        splits=splits, count=count, loss_programs=sums, ROWS=LOSSES, PARTS=PARTS, BLOCK=ELEMENTS,
        num_warps=4,
    )  # fmt: skip


@lru_cache(REMEMBERED)
def _scaling(count: int, D: int, stride_dout: int) -> Launch:
    return Launch(
        kernels._lsh_bce_bwd_kernel_scale, (cdiv(count, ELEMENTS),), D=D, count=count,
        stride_dout=stride_dout, BLOCK=ELEMENTS,
    )  # fmt: skip
