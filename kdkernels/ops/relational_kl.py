# SPDX-License-Identifier: Apache-2.0
"""relational_kl: divergence of two softmaxes over similarities to a bank of keys.

One sweep over the keys gives loss and gradient; nothing of size B x K is written down. Traffic of
one forward and backward for the student, in elements: keys K D per block of rows (and K E of
teacher keys), 2 B (D + E) of rows. Derivation: docs/ops/relational_kl.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, requested_backend
from kdkernels._library import define_operator, first_order
from kdkernels.ops._key_bank import (
    EPS,
    REDUCTIONS,
    bank,
    divided,
    indices,
    one_dtype,
    scale_of,
    temperature,
)

DIVERGENCES = ("kl", "cross_entropy")
CLAMPED = 0.999  # of EPS / norm: from here on the norm was clamped, up to rounding

# The operator knows neither norms of rows nor temperatures: student [B, D] and teacher [B, E] come
# normalised and divided, in the accumulation dtype. Keys come as they are, with a factor per key.
# With logits a = student (key_scale keys)^T, b = teacher (teacher_key_scale teacher_keys)^T,
# teacher_keys None meaning keys, one key per row left out of both (exclude, -1 for none), and
# p = softmax(b), or the one key `positives` of each row where teacher is None; all [B] fp32, fp64
# for fp64:
#   loss         sum_k p_k c_k with c = subtract_entropy log p - log softmax(a)
#   dloss [B, D] its derivative by the student; empty (0) unless with_dloss
#   lse_student  log-sum-exp of a
#   lse_teacher  of b; 0 where teacher is None
# A row that no key is left for has loss and derivatives of 0, and its other residuals are not
# read. The backward scales dloss by rows; other gradients take a second sweep. dkeys and
# dteacher_keys are by the scaled keys, in the accumulation dtype.


def _fwd_fake(
    student: Tensor, teacher: Tensor | None, keys: Tensor, teacher_keys: Tensor | None,
    key_scale: Tensor | None, teacher_key_scale: Tensor | None, positives: Tensor | None,
    exclude: Tensor | None, subtract_entropy: bool, with_dloss: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss, *sums = (student.new_empty(student.shape[0]) for _ in range(3))
    return loss, student.new_empty(student.shape if with_dloss else (0,)), *sums


def _bwd_fake(
    dout: Tensor, student: Tensor, teacher: Tensor | None, keys: Tensor,
    teacher_keys: Tensor | None, key_scale: Tensor | None, teacher_key_scale: Tensor | None,
    positives: Tensor | None, exclude: Tensor | None, subtract_entropy: bool, loss: Tensor,
    dloss: Tensor, lse_student: Tensor, lse_teacher: Tensor, need_student: bool,
    need_teacher: bool, need_keys: bool, need_teacher_keys: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    needs = (need_student, need_teacher, need_keys, need_teacher_keys)
    like = (student, teacher, keys, teacher_keys)
    return tuple(
        student.new_empty(x.shape if needed else (0,))
        for x, needed in zip(like, needs, strict=True)
    )


_TENSORS = (
    "Tensor student, Tensor? teacher, Tensor keys, Tensor? teacher_keys, Tensor? key_scale, "
    "Tensor? teacher_key_scale, Tensor? positives, Tensor? exclude, bool subtract_entropy"
)
_fwd = define_operator(
    "relational_kl",
    "fwd",
    f"({_TENSORS}, bool with_dloss, str backend) -> (Tensor loss, Tensor dloss, "
    "Tensor lse_student, Tensor lse_teacher)",
    _fwd_fake,
)
_bwd = define_operator(
    "relational_kl",
    "bwd",
    f"(Tensor dout, {_TENSORS}, Tensor loss, Tensor dloss, Tensor lse_student, Tensor lse_teacher, "
    "bool need_student, bool need_teacher, bool need_keys, bool need_teacher_keys, str backend) -> "
    "(Tensor dstudent, Tensor dteacher, Tensor dkeys, Tensor dteacher_keys)",
    _bwd_fake,
)


def _through_norms(
    dunit: Tensor,  # [K, D] by the scaled keys
    keys: Tensor,  # [K, D]
    scale: Tensor | None,  # [K]
) -> Tensor:  # [K, D]
    """Gradient by the keys themselves. Where the norm is clamped, the scale is a constant."""
    if scale is not None:
        unit = keys.to(dunit.dtype) * scale[:, None]
        along = (unit * dunit).sum(-1, keepdim=True) * (scale * EPS < CLAMPED)[:, None]
        dunit = (dunit - unit * along) * scale[:, None]
    return dunit.to(keys.dtype)


class RelationalKLFunction(torch.autograd.Function):
    """Attaches the operator pair to autograd, and norms of keys and the reduction to both."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        keys: Tensor,
        teacher_keys: Tensor | None,
        key_scale: Tensor | None,
        teacher_key_scale: Tensor | None,
        positives: Tensor | None,
        exclude: Tensor | None,
        subtract_entropy: bool,
        with_dloss: bool,
        sweep_again: bool,
        reduction: str,
        backend: str,
    ) -> Tensor:
        tensors = (
            student, teacher, keys, teacher_keys, key_scale, teacher_key_scale, positives, exclude,
        )  # fmt: skip
        residuals = _fwd(*tensors, subtract_entropy, with_dloss, backend)
        loss = residuals[0]
        # A backward that only scales dloss reads no keys: a queue may move on before it.
        ctx.save_for_backward(*(tensors if sweep_again else tensors[:1]), *residuals)
        ctx.scale = 1 / max(student.shape[0], 1) if reduction == "mean" else 1.0
        ctx.subtract_entropy, ctx.backend = subtract_entropy, backend
        return loss if reduction == "none" else loss.sum() * ctx.scale

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        tensors, residuals = ctx.saved_tensors[:-4], ctx.saved_tensors[-4:]
        if len(tensors) == 1:  # some tensor in the keys' place
            tensors = (tensors[0], None, tensors[0], *(None,) * 5)
        dout = (dout * ctx.scale).expand(tensors[0].shape[0])
        need = ctx.needs_input_grad[:4]
        grads = _bwd(dout, *tensors, ctx.subtract_entropy, *residuals, *need, ctx.backend)
        dx, dy, dq, dr = (grad if n else None for grad, n in zip(grads, need, strict=True))
        if dq is not None:
            dq = _through_norms(dq, tensors[2], tensors[4])
        if dr is not None:
            dr = _through_norms(dr, tensors[3], tensors[5])
        return dx, dy, dq, dr, *(None,) * 9


def _prepare(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor,
    teacher_keys: Tensor | None = None,
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.02,
    normalize: bool = True,
    divergence: str = "kl",
    exclude: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Any, ...]:
    """Arguments of the forward operator, without with_dloss."""
    bank("keys", keys, "student", student)
    _checks.matrix("teacher", teacher)
    _checks.same_device("teacher", teacher, "student", student)
    _checks.same_leading("teacher", teacher, "student", student)
    if teacher_keys is not None:
        bank("teacher_keys", teacher_keys, "teacher", teacher)
        _checks.same_leading("teacher_keys", teacher_keys, "keys", keys)
    elif teacher.shape[1] != keys.shape[1]:
        raise ValueError(
            f"teacher must have {keys.shape[1]} columns like keys, or teacher_keys of its own, "
            f"got {teacher.shape[1]}"
        )
    student_temperature = temperature("student_temperature", student_temperature, student)
    teacher_temperature = temperature("teacher_temperature", teacher_temperature, student)
    _checks.flag("normalize", normalize)
    _checks.choice("divergence", divergence, DIVERGENCES)
    _checks.choice("reduction", reduction, REDUCTIONS)
    if exclude is not None:
        indices("exclude", exclude, "student", student, keys.shape[0], low=-1)
        exclude = exclude.long()
    named = {"student": student, "teacher": teacher, "keys": keys, "teacher_keys": teacher_keys}
    student, teacher, keys, teacher_keys = one_dtype(named)
    return (
        divided(student, student_temperature, normalize),
        divided(teacher, teacher_temperature, normalize),
        keys,
        teacher_keys,
        scale_of(keys, normalize),
        scale_of(teacher_keys, normalize),
        None,
        exclude,
        divergence == "kl",
    )


def with_dloss(student: Tensor) -> bool:
    return student.requires_grad and torch.is_grad_enabled()


def apply(prepared: tuple[Any, ...], reduction: str, backend: str) -> Tensor:
    """The loss, from the arguments of the forward operator less with_dloss."""
    others = [x for x in prepared[1:4] if x is not None]
    sweep_again = torch.is_grad_enabled() and any(x.requires_grad for x in others)
    return RelationalKLFunction.apply(
        *prepared, with_dloss(prepared[0]), sweep_again, reduction, requested_backend(backend)
    )


def _operator_args(*args: Any, **options: Any) -> tuple[Any, ...]:
    prepared = _prepare(*args, **options)
    return *prepared, with_dloss(prepared[0])


def gradient_choice(student: Tensor) -> dict[str, str]:
    if with_dloss(student):
        return {"gradient": "of the rows in the forward sweep (they require one)"}
    return {"gradient": "none in the forward sweep (the rows require none)"}


def _choices(*args: Any, **options: Any) -> dict[str, str]:
    return gradient_choice(_prepare(*args, **options)[0])


@explained_by(_operator_args, _choices)
def relational_kl(
    student: Tensor,  # [B, D]
    teacher: Tensor,  # [B, E]
    keys: Tensor,  # [K, D]
    teacher_keys: Tensor | None = None,  # [K, E]
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.02,
    normalize: bool = True,
    divergence: Literal["kl", "cross_entropy"] = "kl",
    exclude: Tensor | None = None,  # [B]
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Divergence of the student's from the teacher's distribution over a bank of keys.

    Each row has similarities to K keys, on the teacher's side and on the student's. With

        p = softmax(sim(teacher, teacher_keys) / teacher_temperature)
        q = softmax(sim(student, keys) / student_temperature)

    a row costs sum_k p_k (log p_k - log q_k), or -sum_k p_k log q_k. Neither is multiplied by a
    temperature. B x K matrices are never in memory: one sweep over the keys gives the loss and the
    student's gradient. Gradients of anything else take one more sweep in the backward.

    Args:
        student: [B, D], fp16, bf16, fp32 or fp64. Any strides.
        teacher: [B, E], same dtype and device (under autocast the widest dtype is taken).
        keys: [K, D], a queue or a batch, with K of at least 1; any K.
        teacher_keys: [K, E], or None where both sides share the keys and D = E.
        student_temperature, teacher_temperature: Positive numbers, or tensors of one element and
            no dimension, which get a gradient if they ask for one. A tensor's value is not looked
            at; one that is not positive makes the loss NaN.
        normalize: Divide every row and every key by its norm, clamped at 1e-12: similarities are
            cosines. False takes inner products as they are.
        divergence: "kl", or "cross_entropy", which is larger by the entropy of p. The student's
            gradient is the same.
        exclude: One key per row that neither side counts, integer [B], -1 for none. A row whose
            only key is excluded costs 0.
        reduction: "mean" and "sum" over rows; "none" gives [B].
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or [B]. 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument does not fit, by name. Indices are looked at only where
            they lie on the CPU; elsewhere one that names no key excludes none.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Giakoumoglou and Stathaki, Relational Representation Distillation, 2024, arXiv:2407.12073;
        Fang et al., SEED, ICLR 2021; Koohpayegani et al., CompRess, NeurIPS 2020.
    """
    prepared = _prepare(
        student, teacher, keys, teacher_keys, student_temperature=student_temperature,
        teacher_temperature=teacher_temperature, normalize=normalize, divergence=divergence,
        exclude=exclude, reduction=reduction,
    )  # fmt: skip
    return apply(prepared, reduction, backend)
