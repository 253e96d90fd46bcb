# SPDX-License-Identifier: Apache-2.0
"""gram_mse on Triton: the operator pair.

Algorithms, kernels and launches are in the modules beside this one.

Features are fp16, bf16 or fp32; products accumulate in fp32, sums over rows in fp64. Nothing waits
for the device. The factored algorithm takes fp32 features only where torch's setting for matrix
products allows tf32: otherwise its products are in fp64, which Triton 3.7 fails to compile for
sm_100 and gfx942.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul, refuse_fp64
from kdkernels.triton.common.launch import on_device
from kdkernels.triton.gram_mse import factored, resident, streamed
from kdkernels.triton.gram_mse.call import Call

_FORWARD = {
    "resident": resident.forward,
    "streamed": streamed.forward,
    "factored": factored.forward,
}


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    features = args[1]  # the teacher of a forward, the student of a backward
    if args[-1] == "factored" and features.dtype == torch.float32 and fp32_matmul() == "highest":
        return "the factored algorithm multiplies fp32 features in fp64, for which it has no kernel"
    return refuse_fp64(args[0])


def gram_mse_fwd(
    student: Tensor,  # [G, B, D_s]
    teacher: Tensor,  # [G, B, D_t]
    normalize: str,
    kernel: str,
    gamma: float,
    order: int,
    algorithm: str,
) -> tuple[Tensor, ...]:
    call = Call(student, teacher, normalize, kernel, gamma, order, algorithm)
    if student.numel() == teacher.numel() == 0:
        return _empty(call)
    with on_device(student):
        loss, coef, *grams = _FORWARD[algorithm](call)
    return loss, coef, *(gram.to(call.kept) for gram in grams)


def gram_mse_bwd(
    dout: Tensor,  # [G]
    student: Tensor,  # [G, B, D_s]
    teacher: Tensor,  # [G, B, D_t]
    coef: Tensor,
    gram_student: Tensor,
    gram_teacher: Tensor,
    cross: Tensor,
    need_student: bool,
    need_teacher: bool,
    normalize: str,
    kernel: str,
    gamma: float,
    order: int,
    algorithm: str,
) -> tuple[Tensor, ...]:
    call = Call(student, teacher, normalize, kernel, gamma, order, algorithm)
    features = (student, teacher)
    grads: list[Tensor | None] = [None, None]
    # an empty side has an empty gradient
    need = (need_student and student.numel() > 0, need_teacher and teacher.numel() > 0)
    sides = [side for side in range(2) if need[side]]
    if sides:
        with on_device(student):
            # residuals of another backend need not be dense
            coef = coef.contiguous()
            gram_student, gram_teacher, cross = (
                r.float().contiguous() for r in (gram_student, gram_teacher, cross)
            )
            grams = (gram_student, gram_teacher)
            if student.dtype != torch.float32:
                # fp64 ones are for fp32 features: a rounded coefficient is common to a whole row
                # of weights, and adds up; against 16 bits that is nothing
                coef = coef.float()
            if algorithm == "streamed":
                grads = streamed.gradients(call, dout, coef, need)
            elif algorithm == "resident":
                scales = call.scales()
                for side in sides:
                    grads[side] = resident.gradient(
                        call, side, dout, coef, grams[side], grams[1 - side], scales
                    )
            else:
                scales = call.scales()
                rows = factored.row_factors(call, coef, need) if call.rows_normalised else {}
                for side in sides:
                    row_factor, cross_row = rows.get(("ss", "tt")[side], coef), rows.get("ts", coef)
                    grads[side] = factored.gradient(
                        call, side, dout, coef, grams[side], cross, (row_factor, cross_row), scales
                    )
    return tuple(
        features[side].new_empty(features[side].shape if needed else (0,)) if grad is None else grad
        for side, (needed, grad) in enumerate(zip((need_student, need_teacher), grads, strict=True))
    )


def _empty(call: Call) -> tuple[Tensor, ...]:
    """No rows or no features on either side: every sum is zero."""
    G, B, D_s, D_t = call.sizes
    n_s, n_t = {"resident": (B, B), "streamed": (0, 0), "factored": (D_s, D_t)}[call.algorithm]
    m, n = (D_t, D_s) if call.algorithm == "factored" else (0, 0)
    shapes = ((G,), (G, 5, B), (G, n_s, n_s), (G, n_t, n_t), (G, m, n))
    zeros = partial(torch.zeros, device=call.student.device)
    dtypes = (torch.float32, torch.float64, call.kept, call.kept, call.kept)
    return tuple(zeros(shape, dtype=d) for shape, d in zip(shapes, dtypes, strict=True))
