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
from kdkernels._similarity import NORM_EPS
from kdkernels.ops._key_bank import (
    REDUCTIONS,
    bank,
    cut,
    divided,
    indices,
    limit,
    meet,
    one_dtype,
    scale_of,
    temperature,
)

DIVERGENCES = ("kl", "cross_entropy")
CLAMPED = 0.999  # of NORM_EPS / norm: from here on the norm was clamped, up to rounding

# The operator knows neither norms of rows nor temperatures: student [B, D] and teacher [B, E] come
# normalised and divided, in the accumulation dtype. Keys come as they are, with a factor per key.
# With logits a = student (key_scale keys)^T, b = teacher (teacher_key_scale teacher_keys)^T,
# teacher_keys None meaning keys, one key per row left out of both (exclude, -1 for none), only the
# first num_keys of the keys counting (int64 without dimensions, on the device), one more logit per
# row on each side (own_student, own_teacher [B], where there is a teacher), and p = softmax(b), or
# the one key `positives` of each row where teacher is None; all [B] fp32, fp64 for fp64:
#   loss         sum_k p_k c_k with c = subtract_entropy log p - log softmax(a)
#   dloss [B, D] its derivative by the student; empty (0) unless with_dloss
#   lse_student  log-sum-exp of a
#   lse_teacher  of b; 0 where teacher is None
# A row that no key is left for has loss and derivatives of 0, and its other residuals are not
# read. A positive that names no key that counts makes its row NaN. The backward scales dloss by
# rows; other gradients take a second sweep, those by the own logits none. dkeys and dteacher_keys
# are by the scaled keys, in the accumulation dtype. Keys that do not count may be anything.


def _fwd_fake(
    student: Tensor, teacher: Tensor | None, keys: Tensor, teacher_keys: Tensor | None,
    key_scale: Tensor | None, teacher_key_scale: Tensor | None, positives: Tensor | None,
    exclude: Tensor | None, num_keys: Tensor | None, subtract_entropy: bool,
    own_student: Tensor | None, own_teacher: Tensor | None, with_dloss: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss, *sums = (student.new_empty(student.shape[0]) for _ in range(3))
    return loss, student.new_empty(student.shape if with_dloss else (0,)), *sums


def _bwd_fake(
    dout: Tensor, student: Tensor, teacher: Tensor | None, keys: Tensor,
    teacher_keys: Tensor | None, key_scale: Tensor | None, teacher_key_scale: Tensor | None,
    positives: Tensor | None, exclude: Tensor | None, num_keys: Tensor | None,
    subtract_entropy: bool, loss: Tensor, dloss: Tensor, lse_student: Tensor, lse_teacher: Tensor,
    need_student: bool, need_teacher: bool, need_keys: bool, need_teacher_keys: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    needs = (need_student, need_teacher, need_keys, need_teacher_keys)
    like = (student, teacher, keys, teacher_keys)
    return tuple(
        student.new_empty(x.shape if needed else (0,))
        for x, needed in zip(like, needs, strict=True)
    )


_TENSORS = (
    "Tensor student, Tensor? teacher, Tensor keys, Tensor? teacher_keys, Tensor? key_scale, "
    "Tensor? teacher_key_scale, Tensor? positives, Tensor? exclude, Tensor? num_keys, "
    "bool subtract_entropy"
)
_fwd = define_operator(
    "relational_kl",
    "fwd",
    f"({_TENSORS}, Tensor? own_student, Tensor? own_teacher, bool with_dloss, str backend) -> "
    "(Tensor loss, Tensor dloss, Tensor lse_student, Tensor lse_teacher)",
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
    num_keys: Tensor | None,  # []
) -> Tensor:  # [K, D]
    """Gradient by the keys themselves. Where the norm is clamped, the scale is a constant."""
    if scale is not None:
        unit = keys.to(dunit.dtype) * scale[:, None]
        along = (unit * dunit).sum(-1, keepdim=True) * (scale * NORM_EPS < CLAMPED)[:, None]
        dunit = (dunit - unit * along) * scale[:, None]
        if num_keys is not None:  # norms of what does not count may be anything
            beyond = torch.arange(len(keys), device=keys.device) >= num_keys
            dunit = dunit.masked_fill(beyond[:, None], 0.0)
    return dunit.to(keys.dtype)


def _by_own_logits(
    own_student: Tensor,  # [B]
    own_teacher: Tensor,  # [B]
    loss: Tensor,  # [B]
    lse_student: Tensor,  # [B]
    lse_teacher: Tensor,  # [B]
    subtract_entropy: bool,
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """Derivatives of the loss, those of any key's logits."""
    log_q, log_p = own_student - lse_student, own_teacher - lse_teacher
    p, c = log_p.exp(), (log_p - log_q if subtract_entropy else -log_q)
    return log_q.exp() - p, p * (c - loss)


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
        num_keys: Tensor | None,
        subtract_entropy: bool,
        own_student: Tensor | None,
        own_teacher: Tensor | None,
        with_dloss: bool,
        sweep_again: bool,
        reduction: str,
        backend: str,
    ) -> Tensor:
        tensors = (
            student, teacher, keys, teacher_keys, key_scale, teacher_key_scale, positives, exclude,
            num_keys,
        )  # fmt: skip
        own = own_student, own_teacher
        residuals = _fwd(*tensors, subtract_entropy, *own, with_dloss, backend)
        loss = residuals[0]
        # A backward that only scales dloss reads no keys: a queue may move on before it.
        ctx.save_for_backward(*(tensors if sweep_again else tensors[:1]), *own, *residuals)
        ctx.scale = 1 / max(student.shape[0], 1) if reduction == "mean" else 1.0
        ctx.subtract_entropy, ctx.backend = subtract_entropy, backend
        return loss if reduction == "none" else loss.sum() * ctx.scale

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once: under torch.utils.checkpoint twice is refused
        tensors, (own_student, own_teacher) = saved[:-6], saved[-6:-4]
        loss, dloss, *sums = saved[-4:]
        if len(tensors) == 1:  # some tensor in the keys' place
            tensors = (tensors[0], None, tensors[0], *(None,) * 6)
        dout = (dout * ctx.scale).expand(tensors[0].shape[0])
        need = ctx.needs_input_grad[:4]
        flag = ctx.subtract_entropy
        grads = _bwd(dout, *tensors, flag, loss, dloss, *sums, *need, ctx.backend)
        dx, dy, dq, dr = (grad if n else None for grad, n in zip(grads, need, strict=True))
        if dq is not None:
            dq = _through_norms(dq, tensors[2], tensors[4], tensors[8])
        if dr is not None:
            dr = _through_norms(dr, tensors[3], tensors[5], tensors[8])
        own = None, None
        if own_student is not None:
            by_logits = _by_own_logits(own_student, own_teacher, loss, *sums, flag)
            own = tuple(dout * derivative for derivative in by_logits)
        return dx, dy, dq, dr, *(None,) * 6, *own, *(None,) * 4


def _prepare(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor,
    teacher_keys: Tensor | None = None,
    *,
    own_keys: Tensor | None = None,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.02,
    normalize: bool = True,
    divergence: str = "kl",
    exclude: Tensor | None = None,
    num_keys: int | Tensor | None = None,
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
    if own_keys is not None:
        if teacher_keys is not None:
            raise ValueError("own_keys must be None where there are teacher_keys, got both")
        meet("own_keys", own_keys, "teacher", teacher)
        _checks.same_leading("own_keys", own_keys, "student", student)
    limit(num_keys, keys)
    student_temperature = temperature("student_temperature", student_temperature, student)
    teacher_temperature = temperature("teacher_temperature", teacher_temperature, student)
    _checks.flag("normalize", normalize)
    _checks.choice("divergence", divergence, DIVERGENCES)
    _checks.choice("reduction", reduction, REDUCTIONS)
    if exclude is not None:
        indices("exclude", exclude, "student", student, keys.shape[0], low=-1)
        exclude = exclude.long()
    named = {
        "student": student, "teacher": teacher, "keys": keys, "teacher_keys": teacher_keys,
        "own_keys": own_keys,
    }  # fmt: skip
    student, teacher, keys, teacher_keys, own_keys = one_dtype(named)
    num_keys, keys, teacher_keys = cut(num_keys, keys, teacher_keys)
    x = divided(student, student_temperature, normalize)
    y = divided(teacher, teacher_temperature, normalize)
    own = None, None
    if own_keys is not None:
        own_keys = divided(own_keys, 1.0, normalize)
        own = tuple((rows * own_keys).sum(-1) for rows in (x, y))
    return (
        x,
        y,
        keys,
        teacher_keys,
        scale_of(keys, normalize),
        scale_of(teacher_keys, normalize),
        None,
        exclude,
        num_keys,
        divergence == "kl",
        *own,
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
    own_keys: Tensor | None = None,  # [B, E]
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.02,
    normalize: bool = True,
    divergence: Literal["kl", "cross_entropy"] = "kl",
    exclude: Tensor | None = None,  # [B]
    num_keys: int | Tensor | None = None,
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
        own_keys: [B, E], one more key per row that no other row sees, as SEED has its teacher's
            embedding beside the queue; only where both sides share the keys.
        student_temperature, teacher_temperature: Positive numbers, or tensors of shape [] or
            [1], which get a gradient of their shape if they ask for one. A tensor's value is not
            looked at; one that is not positive makes the loss NaN.
        normalize: Divide every row and every key by its norm, clamped at 1e-12: similarities are
            cosines. False takes inner products as they are.
        divergence: "kl", or "cross_entropy", which is larger by the entropy of p. The student's
            gradient is the same.
        exclude: One key per row that neither side counts, integer [B], -1 for none. A row whose
            only key is excluded costs 0.
        num_keys: How many of the keys count, the first ones, where a queue is not yet full: an
            integer, or an integer tensor without dimensions on the device of the keys, for which
            nothing waits. What lies beyond may be anything, and its gradient is 0.
        reduction: "mean" and "sum" over rows; "none" gives [B].
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or [B]. 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument does not fit, by name. Indices and num_keys are looked at
            only where they lie on the CPU; elsewhere an index that names no key excludes none,
            num_keys is taken to lie between 0 and K, and of 0 keys a row costs 0.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Giakoumoglou and Stathaki, Relational Representation Distillation, 2024, arXiv:2407.12073;
        Fang et al., SEED, ICLR 2021; Koohpayegani et al., CompRess, NeurIPS 2020.
    """
    prepared = _prepare(
        student, teacher, keys, teacher_keys, own_keys=own_keys,
        student_temperature=student_temperature, teacher_temperature=teacher_temperature,
        normalize=normalize, divergence=divergence, exclude=exclude, num_keys=num_keys,
        reduction=reduction,
    )  # fmt: skip
    return apply(prepared, reduction, backend)
