# SPDX-License-Identifier: Apache-2.0
"""relational_kl on Triton: the operators and their launches.

Configurations and kernels are in the modules beside this one. Rows are fp32,
keys fp16, bf16 or fp32; products accumulate in fp32. Weights exist for a chunk of rows, or of keys,
at a time, no larger than half of the L2 cache or one row of tiles. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels._key_bank_call import KeyBankCall
from kdkernels.triton.common.launch import arch_of, cdiv, given, on_device, supports
from kdkernels.triton.common.product import multiply
from kdkernels.triton.relational_kl import bwd_kernels, kernels
from kdkernels.triton.relational_kl.config import MERGED, RelationalKLConfig, pick_config

__all__ = ["relational_kl_bwd", "relational_kl_fwd", "supports"]


def relational_kl_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *call, own_student, own_teacher, need_student = args
    call = KeyBankCall(*call)
    student, keys = call.student, call.keys
    (B, D), K = student.shape, keys.shape[0]
    loss, lse_student, lse_teacher = (student.new_empty(B) for _ in range(3))
    dloss = student.new_empty((B, D) if need_student else (0,))
    if B == 0:
        return loss, dloss, lse_student, lse_teacher
    student, teacher = _contiguous(student), _contiguous(call.teacher)
    config = _config(B, keys)
    tile, sides = config.logits, 1 if teacher is None else 2
    tiles = cdiv(K, tile.n)
    weight_bytes = sides * K * config.weight_dtype.itemsize
    step = config.chunk(B, weight_bytes if need_student else 0, tile.m)
    stats = student.new_empty((3 if teacher is None else 5) * tiles * step)
    weights = keys.new_empty((sides, step * K if need_student else 0), dtype=config.weight_dtype)
    bank = _Bank(keys, call.teacher_keys, call.key_scale, call.teacher_key_scale)
    with on_device(student):
        for first in range(0, B, step):
            rows = slice(first, min(first + step, B))
            count = rows.stop - first
            x, y, positive, excluded, own_s, own_t = (
                None if part is None else part[rows]
                for part in (
                    student,
                    teacher,
                    call.positives,
                    call.exclude,
                    own_student,
                    own_teacher,
                )
            )
            flags = {"TEACHER": teacher is not None, "ENTROPY": call.subtract_entropy}
            flags |= _indices(positive, excluded, call.num_keys, x)
            kernels._relational_kl_weights_kernel[(cdiv(count, tile.m) * tiles,)](
                ws_ptr=weights, wt_ptr=weights[-1], stats_ptr=stats, B=count, K=K,
                **_sides(x, y, bank), **flags, STORE=need_student,
                PRECISION=config.of_logits, **tile.launch(),
            )  # fmt: skip
            kernels._relational_kl_merge_kernel[(cdiv(count, MERGED),)](
                stats_ptr=stats, own_s_ptr=_given(own_s, x), own_t_ptr=_given(own_t, x),
                HAS_OWN=own_s is not None, loss_ptr=loss[rows], lse_s_ptr=lse_student[rows],
                lse_t_ptr=lse_teacher[rows], B=count, K=K, tiles=tiles,
                **flags, FACTORS=need_student, BLOCK=MERGED,
            )  # fmt: skip
            if need_student and D > 0:
                _softmax_product(
                    config,
                    weights,
                    stats,
                    keys,
                    call.key_scale,
                    call.num_keys,
                    dloss[rows],
                    sides == 2,
                )
    if need_student and call.positives is not None:
        _subtract_positives(dloss, keys, call.key_scale, call.positives, call.num_keys)
    return loss, dloss, lse_student, lse_teacher


def relational_kl_bwd(dout: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (
        *call, loss, dloss, lse_student, lse_teacher, need_student, need_teacher, need_keys,
        need_teacher_keys,
    ) = args  # fmt: skip
    call = KeyBankCall(*call)
    student, keys = call.student, call.keys

    def result(like: Tensor | None, needed: bool) -> Tensor:
        return student.new_empty(like.shape if needed else (0,))

    dx = (dout[:, None] * dloss).contiguous() if need_student else student.new_empty(0)
    dy, dq = result(call.teacher, need_teacher), result(keys, need_keys)
    dr = result(call.teacher_keys, need_teacher_keys)
    B = student.shape[0]
    if B == 0:
        return dx, dy, dq.zero_(), dr.zero_()
    config = _config(B, keys)
    rows = _Rows(
        _contiguous(student), _contiguous(call.teacher), call.positives, call.exclude, dout, loss,
        lse_student, lse_teacher, call.num_keys, call.subtract_entropy,
    )  # fmt: skip
    bank = _Bank(keys, call.teacher_keys, call.key_scale, call.teacher_key_scale)
    with on_device(student):
        if dy.numel() > 0:
            _teacher_gradient(config, rows, bank, dy)
        if dq.numel() + dr.numel() > 0:
            _key_gradients(config, rows, bank, dq, dr)
    return dx, dy, dq, dr


class _Bank:
    """Keys and their factors on both sides, and stretches of them."""

    def __init__(
        self,
        keys: Tensor,
        teacher_keys: Tensor | None,
        scale: Tensor | None,
        teacher_scale: Tensor | None,
    ) -> None:
        self.shared = teacher_keys is None
        self.keys, self.scale = keys, scale
        self.teacher_keys = keys if self.shared else teacher_keys
        self.teacher_scale = scale if self.shared else teacher_scale

    def part(self, of: slice) -> _Bank:
        scales = (None if x is None else x[of] for x in (self.scale, self.teacher_scale))
        found = _Bank(self.keys[of], None if self.shared else self.teacher_keys[of], *scales)
        return found


class _Rows:
    """What the derivatives by a row's logits depend on, and stretches of rows."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        positives: Tensor | None,
        exclude: Tensor | None,
        dout: Tensor,
        loss: Tensor,
        lse_student: Tensor,
        lse_teacher: Tensor,
        num_keys: Tensor | None,
        subtract_entropy: bool,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.tensors = (
            student, teacher, positives, exclude, dout, loss, lse_student, lse_teacher,
        )  # fmt: skip
        self.num_keys, self.subtract_entropy = num_keys, subtract_entropy

    def part(self, of: slice) -> _Rows:
        parts = (None if x is None else x[of] for x in self.tensors)
        return _Rows(*parts, self.num_keys, self.subtract_entropy)


def _config(B: int, keys: Tensor) -> RelationalKLConfig:
    return pick_config(
        B, dtype=keys.dtype, arch=arch_of(keys),
        fp32_matmul=fp32_matmul(),
    )  # fmt: skip


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    """`given` for kernels that take contiguous tensors."""
    return given(_contiguous(x), other)


def _indices(
    positives: Tensor | None,  # [B]
    exclude: Tensor | None,  # [B], or [B, K] bool
    num_keys: Tensor | None,  # []
    other: Tensor,
) -> dict[str, Any]:
    """Which keys count for a row, and which one is its positive."""
    mask = exclude is not None and exclude.dtype == torch.bool
    return {
        "positives_ptr": _given(positives, other), "POSITIVES": positives is not None,
        "exclude_ptr": _given(exclude.view(torch.uint8) if mask else exclude, other),
        "HAS_EXCLUDE": exclude is not None, "MASK": mask,
        "num_keys_ptr": _given(num_keys, other), "HAS_NUM_KEYS": num_keys is not None,
    }  # fmt: skip


def _sides(x: Tensor, y: Tensor | None, bank: _Bank) -> dict[str, Any]:
    """Contiguous rows against keys on both sides."""
    y = x if y is None else y
    r = bank.teacher_keys
    return {
        "x_ptr": x, "y_ptr": y, "keys_ptr": bank.keys, "teacher_keys_ptr": r,
        "scale_ptr": _given(bank.scale, x), "teacher_scale_ptr": _given(bank.teacher_scale, x),
        "D": x.shape[1], "E": y.shape[1],
        "stride_kn": bank.keys.stride(0), "stride_kd": bank.keys.stride(1),
        "stride_rn": r.stride(0), "stride_rd": r.stride(1),
        "HAS_SCALE": bank.scale is not None,
    }  # fmt: skip


def _softmax_product(
    config: RelationalKLConfig,
    weights: Tensor,  # [sides, at least B K]
    stats: Tensor,
    keys: Tensor,  # [K, D]
    scale: Tensor | None,  # [K]
    num_keys: Tensor | None,  # []
    out: Tensor,  # [B, D]
    teacher: bool,
) -> None:
    (B, D), K, tile = out.shape, keys.shape[0], config.product
    tiles = tile.count(B, D)
    length, splits = tile.split(K, tiles, config.arch, config.logits.n)
    target = out if splits == 1 else out.new_empty((splits, B, D))
    kernels._relational_kl_fwd_kernel_product[(tiles, splits)](
        ws_ptr=weights, wt_ptr=weights[-1], stats_ptr=stats, keys_ptr=keys,
        scale_ptr=_given(scale, stats), num_keys_ptr=_given(num_keys, stats), out_ptr=target,
        B=B, K=K, D=D, split_k=length,
        stride_kn=keys.stride(0), stride_kd=keys.stride(1),
        TEACHER=teacher, HAS_SCALE=scale is not None, HAS_NUM_KEYS=num_keys is not None,
        PRECISION=config.of_weights,
        TILE=config.logits.n, **tile.launch(),
    )  # fmt: skip
    if splits > 1:
        torch.sum(target, 0, out=out)


def _subtract_positives(
    dloss: Tensor,  # [B, D]
    keys: Tensor,  # [K, D]
    scale: Tensor | None,  # [K]
    positives: Tensor,  # [B]
    num_keys: Tensor | None,  # []
) -> None:
    named = positives.clamp(0, keys.shape[0] - 1)
    wrong = named != positives
    if num_keys is not None:
        wrong |= named >= num_keys
    named_keys = keys[named].to(dloss.dtype)
    named_keys = named_keys if scale is None else named_keys * scale[named, None]
    named_keys.masked_fill_(wrong[:, None], torch.nan)
    dloss -= named_keys


def _derivatives(
    config: RelationalKLConfig,
    rows: _Rows,
    bank: _Bank,
    g: Tensor | None,  # [B, keys of the bank]
    h: Tensor | None,  # [B, keys of the bank]
    first: int,
    total: int,
) -> None:
    x, y, positives, exclude, dout, loss, lse_student, lse_teacher = rows.tensors
    B, K, tile = x.shape[0], bank.keys.shape[0], config.logits
    bwd_kernels._relational_kl_derivatives_kernel[(tile.count(B, K),)](
        **_indices(positives, exclude, rows.num_keys, x),
        loss_ptr=loss.contiguous(), lse_s_ptr=lse_student.contiguous(),
        lse_t_ptr=lse_teacher.contiguous(), dout_ptr=dout,
        g_ptr=_given(g, x), h_ptr=_given(h, x), first=first, total=total, B=B, K=K,
        **_sides(x, y, bank), stride_dout=dout.stride(0),
        TEACHER=y is not None, ENTROPY=rows.subtract_entropy,
        STUDENT=g is not None, PRECISION=config.of_logits, **tile.launch(),
    )  # fmt: skip


def _teacher_gradient(
    config: RelationalKLConfig, rows: _Rows, bank: _Bank, dteacher: Tensor
) -> None:
    """In chunks of rows, of which each row of dteacher needs one only."""
    B, K = rows.student.shape[0], bank.keys.shape[0]
    step = config.chunk(B, K * config.derivative_dtype.itemsize, config.logits.m)
    memory = bank.keys.new_empty(step * K, dtype=config.derivative_dtype)
    product = config.product, config.arch, config.of_weights
    scale = _contiguous(bank.teacher_scale)
    for begin in range(0, B, step):
        part = slice(begin, min(begin + step, B))
        h = memory[: (part.stop - begin) * K].view(-1, K)
        _derivatives(config, rows.part(part), bank, None, h, 0, K)
        multiply(*product, h, bank.teacher_keys, dteacher[part], scale=scale, count=rows.num_keys)


def _key_gradients(
    config: RelationalKLConfig,
    rows: _Rows,
    bank: _Bank,
    dkeys: Tensor,  # [K, D] or empty
    dteacher_keys: Tensor,  # [K, E] or empty
) -> None:
    """In chunks of keys, of which each row of the gradients needs one only."""
    B, K = rows.student.shape[0], bank.keys.shape[0]
    student, teacher = rows.student, rows.teacher
    dtype = config.derivative_dtype
    step = config.chunk(K, 2 * B * dtype.itemsize, config.logits.n)
    memory = bank.keys.new_empty((2, B * step), dtype=dtype)
    product = config.product, config.arch, config.of_weights
    for begin in range(0, K, step):
        part = slice(begin, min(begin + step, K))
        count = part.stop - begin
        g, h = (side[: B * count].view(B, count) for side in memory)
        h = None if teacher is None else h
        _derivatives(config, rows, bank.part(part), g if dkeys.numel() else None, h, begin, K)
        if dkeys.numel() > 0:
            second = (h.T, teacher) if h is not None and bank.shared else None
            multiply(*product, g.T, student, dkeys[part], second=second)
        if dteacher_keys.numel() > 0:
            multiply(*product, h.T, teacher, dteacher_keys[part])
