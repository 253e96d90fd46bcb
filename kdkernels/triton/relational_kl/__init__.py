# SPDX-License-Identifier: Apache-2.0
"""relational_kl on Triton: the operators and their launches.

What sizes decide, configurations and kernels are in the modules beside this one. Rows and keys are
multiplied as they are, fp16, bf16 or fp32, and accumulate in fp32, where their scales come in.
Weights exist for a chunk of rows, or of keys, at a time, no larger than half of the L2 cache or one
row of tiles. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._key_bank_call import KeyBankCall
from kdkernels.triton.common.launch import on_device, supports
from kdkernels.triton.common.product import multiply
from kdkernels.triton.relational_kl.plan import (
    OWN,
    STUDENT,
    TEACHER,
    Facts,
    derivatives,
    facts_of,
    forward_plan,
    keys_gradient,
    rows_gradient,
    tensors_of,
)

__all__ = ["relational_kl_bwd", "relational_kl_fwd", "supports"]

_Table = dict[str, Any]  # tensors of a call by the names that kernels have for them


def relational_kl_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *call, student_temperature, teacher_temperature, need_student = args
    call = _contiguous(KeyBankCall(*call))
    student, K = call.student, call.keys.shape[0]
    table: _Table = tensors_of(call)
    plan = forward_plan(facts_of(call, table), need_student)
    loss = student.new_empty(student.shape[0], dtype=torch.float32)
    dloss = loss.new_empty(student.shape if need_student else (0,))
    numbers = loss.new_empty((7, student.shape[0]))
    banks = 1 if call.teacher_keys is None else 2
    key_scales = loss.new_empty((banks if call.normalize else 0, K))
    table |= {
        "loss_ptr": loss, "numbers_ptr": numbers, "key_scales_ptr": key_scales,
        "x_temperature": student_temperature, "y_temperature": teacher_temperature,
    }  # fmt: skip
    if plan.chunks:
        table["stats_ptr"] = loss.new_empty(plan.stats)
    if plan.weights > 0:
        table["weights_ptr"] = student.new_empty(plan.weights, dtype=plan.weight_dtype)
    with on_device(student):
        if plan.scales is not None:
            plan.scales(table)
        for chunk in plan.chunks:
            chunk.weights(table)
            chunk.merge(table)
            if chunk.product is None:
                continue
            if chunk.splits == 1:
                table["out_ptr"] = dloss
                chunk.product(table)
                continue
            parts = table["out_ptr"] = loss.new_empty((chunk.splits, chunk.rows, student.shape[1]))
            chunk.product(table)
            torch.sum(parts, 0, out=dloss[chunk.first : chunk.first + chunk.rows])
    return loss, dloss, numbers, key_scales


def relational_kl_bwd(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    (
        *call, loss, dloss, numbers, key_scales, need_student, need_teacher, need_keys,
        need_teacher_keys, need_own_keys, need_student_factor, need_teacher_factor,
    ) = args  # fmt: skip
    call = _contiguous(KeyBankCall(*call))

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
    table: _Table = tensors_of(call)
    facts, stride = facts_of(call, table), dout.stride(0)
    table |= {
        "dout_ptr": dout, "loss_ptr": loss.contiguous(), "numbers_ptr": numbers.contiguous(),
        "key_scales_ptr": key_scales.contiguous(),
    }  # fmt: skip
    with on_device(call.student):
        if need_student or need_student_factor:
            table |= {"v_ptr": dloss.contiguous(), "out_ptr": dx, "dfactor_ptr": by_student}
            table["factor_ptr"] = call.student_factor
            rows_gradient(facts, STUDENT, stride, need_student, need_student_factor)(table)
        if need_own_keys:
            table["out_ptr"] = do
            rows_gradient(facts, OWN, stride, True, False)(table)
        if need_teacher or need_teacher_factor:
            v = _teacher_derivatives(call, facts, table)
            table |= {"v_ptr": v, "out_ptr": dy, "dfactor_ptr": by_teacher}
            table["factor_ptr"] = call.teacher_factor
            rows_gradient(facts, TEACHER, stride, need_teacher, need_teacher_factor)(table)
        if need_keys or need_teacher_keys:
            _key_gradients(call, facts, table, dq, dr)
    return results


def _contiguous(call: KeyBankCall) -> KeyBankCall:
    """The call as kernels take it, with bytes in the place of bools."""
    tensors = [x if x is None or x.is_contiguous() else x.contiguous() for x in call[:-2]]
    call = KeyBankCall(*tensors, *call[-2:])
    if call.exclude is None or call.exclude.dtype != torch.bool:
        return call
    return call._replace(exclude=call.exclude.view(torch.uint8))


def _teacher_derivatives(call: KeyBankCall, facts: Facts, table: _Table) -> Tensor:  # [B, E] fp32
    """By the teacher times its scales, in chunks of rows, of which each needs one only."""
    config, dout = facts.config, table["dout_ptr"]
    keys = call.keys if call.teacher_keys is None else call.teacher_keys
    B, K = facts.B, facts.K
    out = dout.new_empty((B, facts.E))
    scale = table["key_scales_ptr"][-1] if call.normalize else None  # those of the teacher's bank
    step = config.chunk(B, K * config.derivative_dtype.itemsize, config.logits.m)
    memory = keys.new_empty(step * K, dtype=config.derivative_dtype)
    for begin in range(0, B, step):
        rows = range(begin, min(begin + step, B))
        h = table["h_ptr"] = memory[: len(rows) * K].view(-1, K)
        derivatives(facts, rows, range(K), dout.stride(0), False, by_rows=False)(table)
        multiply(
            config.product, config.arch, config.of_weights, h, keys, out[begin : rows.stop],
            scale=scale, count=call.num_keys,
        )  # fmt: skip
    return out


def _key_gradients(
    call: KeyBankCall,
    facts: Facts,
    table: _Table,
    dkeys: Tensor,  # [K, D] or empty
    dteacher_keys: Tensor,  # [K, E] or empty
) -> None:
    """In chunks of keys, of which each row of the gradients needs one only."""
    config, dout, B, K = facts.config, table["dout_ptr"], facts.B, facts.K
    student, teacher = call.student, call.teacher
    v, w = (
        # derivatives by keys over their norms, or by keys: fp32 makes room for them in the result
        dout.new_empty(x.shape) if call.normalize and x.dtype != torch.float32 else x
        for x in (dkeys, dteacher_keys)
    )
    dtype = config.derivative_dtype
    step = config.chunk(K, 2 * B * dtype.itemsize, config.logits.n)
    memory = student.new_empty((2, B * step), dtype=dtype)
    product = config.product, config.arch, config.of_weights
    shared, of_student = teacher is not None and call.teacher_keys is None, v.numel() > 0
    for begin in range(0, K, step):
        keys = range(begin, min(begin + step, K))
        part = slice(begin, keys.stop)
        g, h = (side[: B * len(keys)].view(B, len(keys)) for side in memory)
        table |= {"g_ptr": g, "h_ptr": h}
        derivatives(facts, range(B), keys, dout.stride(0), of_student, by_rows=True)(table)
        if of_student:
            multiply(*product, g.T, student, v[part], second=(h.T, teacher) if shared else None)
        if w.numel() > 0:
            multiply(*product, h.T, teacher, w[part])
    if not call.normalize:
        return
    scales = table["key_scales_ptr"]
    for x, bank, scale, out in (
        (v, call.keys, scales[0], dkeys),
        (w, call.teacher_keys, scales[-1], dteacher_keys),
    ):
        if x.numel() > 0:
            table |= {"v_ptr": x, "keys_ptr": bank, "scales_ptr": scale, "out_ptr": out}
            keys_gradient(facts, x.shape[1])(table)
