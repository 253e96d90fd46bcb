# SPDX-License-Identifier: Apache-2.0
"""relational_kl on Triton: the operators and their launches.

Configurations and kernels are in the modules beside this one. Rows and keys are multiplied as they
are, fp16, bf16 or fp32, and accumulate in fp32, where their scales come in. Weights exist for a
chunk of rows, or of keys, at a time, no larger than half of the L2 cache or one row of tiles.
Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels._key_bank_call import KeyBankCall
from kdkernels.triton.common.launch import COLUMNS, ROWS, arch_of, cdiv, on_device, supports
from kdkernels.triton.common.product import multiply
from kdkernels.triton.relational_kl import bwd_kernels, kernels, row_kernels
from kdkernels.triton.relational_kl.config import RelationalKLConfig, pick_config

__all__ = ["relational_kl_bwd", "relational_kl_fwd", "supports"]

_STUDENT, _TEACHER, _OWN = range(3)  # whose gradient `_relational_kl_bwd_rows_kernel` makes
_OF_ROWS = {"ROWS": ROWS, "COLUMNS": COLUMNS}


def relational_kl_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *call, student_temperature, teacher_temperature, need_student = args
    call = _contiguous(KeyBankCall(*call))
    student, teacher, keys = call.student, call.teacher, call.keys
    (B, D), K = student.shape, keys.shape[0]
    loss = student.new_empty(B, dtype=torch.float32)
    dloss = loss.new_empty((B, D) if need_student else (0,))
    numbers = loss.new_empty((7, B))
    banks = 1 if call.teacher_keys is None else 2
    key_scales = loss.new_empty((banks if call.normalize else 0, K))
    if B == 0:
        with on_device(student):
            _scales(call, student_temperature, teacher_temperature, numbers, key_scales)
        return loss, dloss, numbers, key_scales
    config = _config(call)
    tile, sides = config.logits, 1 if teacher is None else 2
    tiles = cdiv(K, tile.n)
    weight_bytes = sides * K * config.weight_dtype.itemsize
    step = config.chunk(B, weight_bytes if need_student else 0, tile.m)
    stats = loss.new_empty((3 if teacher is None else 5) * tiles * step)
    weights = None
    if need_student:
        weights = keys.new_empty(sides * step * K, dtype=config.weight_dtype)
    mask, scales = _is_mask(call.exclude), key_scales if call.normalize else None
    merged_rows, merged_tiles = config.merge
    with on_device(student):
        _scales(call, student_temperature, teacher_temperature, numbers, key_scales)
        for first in range(0, B, step):
            rows = min(step, B - first)
            kernels._relational_kl_weights_kernel[(cdiv(rows, tile.m) * tiles,)](
                x_ptr=student, y_ptr=teacher, keys_ptr=keys, teacher_keys_ptr=call.teacher_keys,
                key_scales_ptr=scales, numbers_ptr=numbers, positives_ptr=call.positives,
                exclude_ptr=call.exclude, num_keys_ptr=call.num_keys, weights_ptr=weights,
                stats_ptr=stats, first=first, rows=rows, B=B, K=K, D=D, E=_width(call),
                MASK=mask, ENTROPY=call.subtract_entropy, PRECISION=config.of_logits,
                **tile.launch(),
            )  # fmt: skip
            kernels._relational_kl_merge_kernel[(cdiv(rows, merged_rows),)](
                stats_ptr=stats, positives_ptr=call.positives, exclude_ptr=call.exclude,
                num_keys_ptr=call.num_keys, numbers_ptr=numbers, loss_ptr=loss, first=first,
                rows=rows, B=B, K=K, tiles=tiles, TEACHER=teacher is not None,
                OWN=call.own_keys is not None, MASK=mask, ENTROPY=call.subtract_entropy,
                FACTORS=need_student, ROWS=merged_rows, TILES=merged_tiles,
            )  # fmt: skip
            if weights is not None and D > 0:
                _softmax_product(config, call, weights, stats, scales, dloss, first, rows)
    return loss, dloss, numbers, key_scales


def relational_kl_bwd(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    (
        *call, loss, dloss, numbers, key_scales, need_student, need_teacher, need_keys,
        need_teacher_keys, need_own_keys, need_student_factor, need_teacher_factor,
    ) = args  # fmt: skip
    call = _contiguous(KeyBankCall(*call))
    known = dout, *(x.contiguous() for x in (loss, numbers, key_scales))

    def result(like: Tensor | None, needed: bool) -> Tensor:
        return call.student.new_empty(like.shape if needed else (0,))

    dx, dy = result(call.student, need_student), result(call.teacher, need_teacher)
    dq, dr = result(call.keys, need_keys), result(call.teacher_keys, need_teacher_keys)
    do = result(call.own_keys, need_own_keys)
    by_student, by_teacher = (
        dout.new_empty(dout.shape if needed else (0,))
        for needed in (need_student_factor, need_teacher_factor)
    )
    results = dx, dy, dq, dr, do, by_student, by_teacher
    if dout.shape[0] == 0:
        dq.zero_(), dr.zero_()
        return results
    with on_device(call.student):
        if need_student or need_student_factor:
            _rows_gradient(_STUDENT, call, known, dloss.contiguous(), dx, by_student)
        if need_own_keys:
            _rows_gradient(_OWN, call, known, None, do, None)
        if need_teacher or need_teacher_factor:
            v = _teacher_derivatives(call, known)
            _rows_gradient(_TEACHER, call, known, v, dy, by_teacher)
        if need_keys or need_teacher_keys:
            _key_gradients(call, known, dq, dr)
    return results


def _contiguous(call: KeyBankCall) -> KeyBankCall:
    """The call as kernels take it, with bytes in the place of bools."""
    tensors = [x if x is None or x.is_contiguous() else x.contiguous() for x in call[:-2]]
    call = KeyBankCall(*tensors, *call[-2:])
    if call.exclude is None or call.exclude.dtype != torch.bool:
        return call
    return call._replace(exclude=call.exclude.view(torch.uint8))


def _config(call: KeyBankCall) -> RelationalKLConfig:
    return pick_config(
        call.student.shape[0], dtype=call.keys.dtype, arch=arch_of(call.keys),
        fp32_matmul=fp32_matmul(),
    )  # fmt: skip


def _is_mask(exclude: Tensor | None) -> bool:
    return exclude is not None and exclude.dtype == torch.uint8


def _width(call: KeyBankCall) -> int:
    """Of the teacher's rows."""
    return (call.student if call.teacher is None else call.teacher).shape[1]


def _scales(
    call: KeyBankCall,
    student_temperature: float,
    teacher_temperature: float,
    numbers: Tensor,  # [7, B]
    key_scales: Tensor,  # [n, K]
) -> None:
    (B, D), K = call.student.shape, call.keys.shape[0]
    programs = cdiv(B, ROWS) + len(key_scales) * cdiv(K, ROWS)
    if programs == 0:
        return
    row_kernels._relational_kl_scales_kernel[(programs,)](
        x_ptr=call.student, y_ptr=call.teacher, own_ptr=call.own_keys, keys_ptr=call.keys,
        teacher_keys_ptr=call.teacher_keys, x_factor_ptr=call.student_factor,
        y_factor_ptr=call.teacher_factor, numbers_ptr=numbers, key_scales_ptr=key_scales, B=B, K=K,
        D=D, E=_width(call), x_temperature=student_temperature, y_temperature=teacher_temperature,
        NORMALIZE=call.normalize, **_OF_ROWS,
    )  # fmt: skip


def _softmax_product(
    config: RelationalKLConfig,
    call: KeyBankCall,
    weights: Tensor,  # sides, rows, K
    stats: Tensor,
    key_scales: Tensor | None,  # [n, K]
    dloss: Tensor,  # [B, D]
    first: int,
    rows: int,
) -> None:
    D, K, tile = dloss.shape[1], call.keys.shape[0], config.product
    tiles = tile.count(rows, D)
    length, splits = tile.split(K, tiles, config.arch, config.logits.n)
    target = dloss if splits == 1 else dloss.new_empty((splits, rows, D))
    kernels._relational_kl_fwd_kernel_product[(tiles, splits)](
        weights_ptr=weights, stats_ptr=stats, keys_ptr=call.keys, key_scales_ptr=key_scales,
        positives_ptr=call.positives, num_keys_ptr=call.num_keys, out_ptr=target, first=first,
        rows=rows, K=K, D=D, split_k=length, TEACHER=call.teacher is not None, SPLIT=splits > 1,
        PRECISION=config.of_weights, TILE=config.logits.n, **tile.launch(),
    )  # fmt: skip
    if splits > 1:
        torch.sum(target, 0, out=dloss[first : first + rows])


# dout [B], loss [B], numbers [7, B], key_scales [n, K]
_Known = tuple[Tensor, Tensor, Tensor, Tensor]


def _rows_gradient(
    of: int,
    call: KeyBankCall,
    known: _Known,
    v: Tensor | None,  # [B, D] fp32
    out: Tensor,  # [B, D], or empty
    dfactor: Tensor | None,  # [B], or empty
) -> None:
    dout, loss, numbers, _ = known
    of_row = (call.student, call.teacher, call.own_keys)[of]
    B, D = of_row.shape
    row_kernels._relational_kl_bwd_rows_kernel[(cdiv(B, ROWS),)](
        v_ptr=v, x_ptr=call.student, y_ptr=call.teacher, own_ptr=call.own_keys,
        numbers_ptr=numbers, loss_ptr=loss, dout_ptr=dout,
        factor_ptr=call.teacher_factor if of == _TEACHER else call.student_factor,
        out_ptr=out if out.shape == of_row.shape else None,
        dfactor_ptr=dfactor if dfactor is not None and dfactor.numel() else None, B=B, D=D,
        stride_dout=dout.stride(0), OF=of, NORMALIZE=call.normalize,
        ENTROPY=call.subtract_entropy, **_OF_ROWS,
    )  # fmt: skip


def _derivatives(
    config: RelationalKLConfig,
    call: KeyBankCall,
    known: _Known,
    rows: range,
    keys: range,
    g: Tensor | None,  # [rows, keys]
    h: Tensor | None,  # [rows, keys]
    by_rows: bool,
) -> None:
    dout, loss, numbers, key_scales = known
    (B, D), K, tile = call.student.shape, call.keys.shape[0], config.logits
    bwd_kernels._relational_kl_derivatives_kernel[(tile.count(len(rows), len(keys)),)](
        x_ptr=call.student, y_ptr=call.teacher, keys_ptr=call.keys,
        teacher_keys_ptr=call.teacher_keys, key_scales_ptr=key_scales if call.normalize else None,
        numbers_ptr=numbers, positives_ptr=call.positives, exclude_ptr=call.exclude,
        num_keys_ptr=call.num_keys, loss_ptr=loss, dout_ptr=dout, g_ptr=g, h_ptr=h,
        first_row=rows.start, first_key=keys.start, rows=len(rows), keys=len(keys), B=B, K=K, D=D,
        E=_width(call), stride_dout=dout.stride(0), BY_ROWS=by_rows, MASK=_is_mask(call.exclude),
        ENTROPY=call.subtract_entropy, PRECISION=config.of_logits, **tile.launch(),
    )  # fmt: skip


def _teacher_derivatives(call: KeyBankCall, known: _Known) -> Tensor:  # [B, E] fp32
    """By the teacher times its scales, in chunks of rows, of which each needs one only."""
    config = _config(call)
    keys = call.keys if call.teacher_keys is None else call.teacher_keys
    B, (K, E) = call.student.shape[0], keys.shape
    out = known[0].new_empty((B, E))
    step = config.chunk(B, K * config.derivative_dtype.itemsize, config.logits.m)
    memory = keys.new_empty(step * K, dtype=config.derivative_dtype)
    for begin in range(0, B, step):
        rows = range(begin, min(begin + step, B))
        h = memory[: len(rows) * K].view(-1, K)
        _derivatives(config, call, known, rows, range(K), None, h, by_rows=False)
        multiply(
            config.product, config.arch, config.of_weights, h, keys, out[begin : rows.stop],
            count=call.num_keys,
        )  # fmt: skip
    return out


def _key_gradients(
    call: KeyBankCall,
    known: _Known,
    dkeys: Tensor,  # [K, D] or empty
    dteacher_keys: Tensor,  # [K, E] or empty
) -> None:
    """In chunks of keys, of which each row of the gradients needs one only."""
    config = _config(call)
    B, K = call.student.shape[0], call.keys.shape[0]
    student, teacher = call.student, call.teacher
    v, w = (
        # derivatives by keys over their norms, or by keys: fp32 makes room for them in the result
        known[0].new_empty(x.shape) if call.normalize and x.dtype != torch.float32 else x
        for x in (dkeys, dteacher_keys)
    )
    dtype = config.derivative_dtype
    step = config.chunk(K, 2 * B * dtype.itemsize, config.logits.n)
    memory = student.new_empty((2, B * step), dtype=dtype)
    product = config.product, config.arch, config.of_weights
    for begin in range(0, K, step):
        keys = range(begin, min(begin + step, K))
        part = slice(begin, keys.stop)
        g, h = (side[: B * len(keys)].view(B, len(keys)) for side in memory)
        h = None if teacher is None else h
        _derivatives(config, call, known, range(B), keys, g if v.numel() else None, h, by_rows=True)
        if v.numel() > 0:
            shared = h is not None and call.teacher_keys is None
            multiply(*product, g.T, student, v[part], second=(h.T, teacher) if shared else None)
        if w.numel() > 0:
            multiply(*product, h.T, teacher, w[part])
    if call.normalize:
        scales = known[3]
        for x, keys, scale, out in (
            (v, call.keys, scales, dkeys),
            (w, call.teacher_keys, scales[1:], dteacher_keys),
        ):
            if x.numel() > 0:
                row_kernels._relational_kl_bwd_keys_kernel[(cdiv(K, ROWS),)](
                    v_ptr=x, keys_ptr=keys, scales_ptr=scale, num_keys_ptr=call.num_keys,
                    out_ptr=out, K=K, D=x.shape[1], **_OF_ROWS,
                )  # fmt: skip
