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
from kdkernels.triton.gram_mse.call import Call, call_of, curve

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
    call = call_of(student, teacher, normalize, kernel, order, algorithm)
    if student.numel() == teacher.numel() == 0:
        return _empty(call, student.device)
    with on_device(student):
        loss, coef, *factors = _FORWARD[algorithm](call, student, teacher, curve(kernel, gamma))
    if call.kept != torch.float32:
        factors = [factor.to(call.kept) for factor in factors]
    return loss, coef, *factors


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
    features, grads = (student, teacher), [student, teacher]
    # an empty side has an empty gradient
    need = (need_student and student.numel() > 0, need_teacher and teacher.numel() > 0)
    for side, needed in enumerate((need_student, need_teacher)):
        if not need[side]:
            grads[side] = features[side].new_empty(features[side].shape if needed else (0,))
    if not any(need):
        return tuple(grads)
    call = call_of(student, teacher, normalize, kernel, order, algorithm)
    curved = curve(kernel, gamma)
    with on_device(student):
        # fp64 coefficients are for fp32 features: a rounded one is common to a whole row of
        # weights, and adds up; against 16 bits that is nothing
        coef = _dense(coef, torch.float64 if student.dtype == torch.float32 else torch.float32)
        if algorithm == "streamed":
            found = streamed.gradients(call, features, dout, coef, need, curved)
        elif algorithm == "resident":
            grams = [_dense(gram, torch.float32) for gram in (gram_student, gram_teacher)]
            found = resident.gradients(call, features, dout, coef, grams, need, curved)
        else:
            factors = [_dense(x, torch.float32) for x in (gram_student, gram_teacher, cross)]
            found = factored.gradients(call, features, dout, coef, factors, need)
    for side, grad in found.items():
        grads[side] = grad
    return tuple(grads)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Residuals of another backend may have other strides, and factors are kept in fp64."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _empty(call: Call, device: torch.device) -> tuple[Tensor, ...]:
    """No rows or no features on either side: every sum is zero."""
    G, B, D_s, D_t = call.sizes
    n_s, n_t = {"resident": (B, B), "streamed": (0, 0), "factored": (D_s, D_t)}[call.algorithm]
    m, n = (D_t, D_s) if call.algorithm == "factored" else (0, 0)
    shapes = ((G,), (G, 5, B), (G, n_s, n_s), (G, n_t, n_t), (G, m, n))
    zeros = partial(torch.zeros, device=device)
    dtypes = (torch.float32, torch.float64, call.kept, call.kept, call.kept)
    return tuple(zeros(shape, dtype=d) for shape, d in zip(shapes, dtypes, strict=True))
