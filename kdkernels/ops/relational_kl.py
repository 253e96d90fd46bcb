# SPDX-License-Identifier: Apache-2.0
"""relational_kl: divergence of two softmaxes over similarities to a bank of keys.

One sweep over the keys gives loss and gradient; nothing of size B x K is written down. Traffic of
one forward and backward for the student, in elements: keys K D per block of rows (and K E of
teacher keys), 2 B (D + E) of rows. Derivation: docs/ops/relational_kl.md.
"""

from __future__ import annotations

from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form, requested_backend
from kdkernels._function import KernelFunction, keep_for_backward
from kdkernels._key_bank_call import KeyBankCall
from kdkernels._library import define_operator, first_order
from kdkernels._similarity import NORM_EPS
from kdkernels.ops import _key_bank, _rows

DIVERGENCES = ("kl", "cross_entropy")
CLAMPED = 0.999  # of NORM_EPS / norm: from here on the norm was clamped, up to rounding

# The operators take student [B, D] and teacher [B, E] normalised and divided by the temperature, in
# the accumulation dtype, and the keys as they are, with a factor per key. The logits are
#     a = student (key_scale keys)^T                  [B, K], and
#     b = teacher (teacher_key_scale teacher_keys)^T  [B, K], of `keys` where teacher_keys is None.
# A softmax of each row of a and of b runs over the keys that count: the first num_keys (int64
# without dimensions, on the device; None: all), less the key `exclude` of the row (-1: none).
# own_student and own_teacher [B], where given, are one more logit of each row on each side. The
# teacher's probabilities are p = softmax(b). Where teacher is None, p is 1 at the row's key
# `positives`; where that is None too, at own_student; with neither, p is 0, so that the loss is
# the log-sum-exp of a. There `exclude` may be a bool mask [B, K] of keys that do not count, which
# holds no row's positive. Results of the forward, the same for every backend; fp64 for fp64 inputs,
# else fp32:
#   loss         [B]     sum_k p_k c_k with c = subtract_entropy log p - log softmax(a)
#   dloss        [B, D]  its derivative by the student; empty (0) unless need_student
#   lse_student  [B]     log-sum-exp of a
#   lse_teacher  [B]     log-sum-exp of b; 0 where teacher is None
# A row that no key is left for has loss and derivatives of 0, and its other residuals are not
# read. A positive that names no key that counts makes its row NaN. The backward scales dloss by
# rows for the student. Other gradients take a second sweep over the keys, except those of
# own_student and own_teacher, which need no operator. dkeys and dteacher_keys are derivatives by
# the scaled keys, in the accumulation dtype. Keys that do not count may hold anything.


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *call, _, _, need_student, _ = args
    student = KeyBankCall(*call).student
    loss, *sums = (student.new_empty(student.shape[0]) for _ in range(3))
    return loss, student.new_empty(student.shape if need_student else (0,)), *sums


def _bwd_fake(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *call, _, _, _, _, need_student, need_teacher, need_keys, need_teacher_keys, _ = args
    call = KeyBankCall(*call)
    needs = (need_student, need_teacher, need_keys, need_teacher_keys)
    like = (call.student, call.teacher, call.keys, call.teacher_keys)
    return tuple(
        call.student.new_empty(x.shape if needed else (0,))
        for x, needed in zip(like, needs, strict=True)
    )


_IN_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool"}
_CALL = ", ".join(
    f"{_IN_SCHEMA[hint]} {name}" for name, hint in get_type_hints(KeyBankCall).items()
)
_fwd = define_operator(
    "relational_kl",
    "fwd",
    f"({_CALL}, Tensor? own_student, Tensor? own_teacher, bool need_student, str backend) -> "
    "(Tensor loss, Tensor dloss, Tensor lse_student, Tensor lse_teacher)",
    _fwd_fake,
)
_bwd = define_operator(
    "relational_kl",
    "bwd",
    f"(Tensor dout, {_CALL}, Tensor loss, Tensor dloss, Tensor lse_student, Tensor lse_teacher, "
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
    own_teacher: Tensor | None,  # [B]; None: the student's is the positive one
    loss: Tensor,  # [B]
    lse_student: Tensor,  # [B]
    lse_teacher: Tensor,  # [B]
    subtract_entropy: bool,
) -> tuple[Tensor, Tensor | None]:  # [B], [B]
    """Derivatives of the loss by these logits, which enter it like those of any key."""
    if own_teacher is None:
        return (own_student - lse_student).expm1(), None
    log_q, log_p = own_student - lse_student, own_teacher - lse_teacher
    p, c = log_p.exp(), (log_p - log_q if subtract_entropy else -log_q)
    return log_q.exp() - p, p * (c - loss)


class RelationalKLFunction(KernelFunction):
    """Attaches the operator pair to autograd, and norms of keys and the reduction to both."""

    @staticmethod
    def forward(
        ctx: Any,
        own_student: Tensor | None,
        own_teacher: Tensor | None,
        need_student: bool,
        sweep_again: bool,
        reduction: str,
        backend: str,
        *args: Any,
    ) -> Tensor:
        call = KeyBankCall(*args)
        loss, *others = _fwd(*call, own_student, own_teacher, need_student, backend)
        # A backward that only scales dloss reads no keys: a queue may move on before it. Its
        # operator receives the student in the place of the keys.
        kept = call if sweep_again else KeyBankCall(call.student, None, call.student)
        *tensors, _ = kept
        keep_for_backward(ctx, own_student, own_teacher, loss, *others, *tensors)
        ctx.scale = 1 / max(call.student.shape[0], 1) if reduction == "mean" else 1.0
        ctx.subtract_entropy, ctx.backend = call.subtract_entropy, backend
        # a copy, since the backward reads the losses and users change theirs in place
        return loss.clone() if reduction == "none" else loss.sum() * ctx.scale

    @staticmethod
    @first_order
    def backward(ctx: Any, kept: tuple[Tensor | None, ...], dout: Tensor) -> tuple[Any, ...]:
        own_student, own_teacher, loss, dloss, lse_student, lse_teacher, *tensors = kept
        call = KeyBankCall(*tensors, ctx.subtract_entropy)
        need = KeyBankCall(*ctx.needs_input_grad[-len(KeyBankCall._fields) :])
        dout = (dout * ctx.scale).expand(call.student.shape[0])
        dstudent, dteacher, dkeys, dteacher_keys = _bwd(
            dout, *call, loss, dloss, lse_student, lse_teacher, need.student, need.teacher,
            need.keys, need.teacher_keys, ctx.backend,
        )  # fmt: skip
        grads = KeyBankCall(
            dstudent if need.student else None,
            dteacher if need.teacher else None,
            _through_norms(dkeys, call.keys, call.key_scale, call.num_keys) if need.keys else None,
            _through_norms(dteacher_keys, call.teacher_keys, call.teacher_key_scale, call.num_keys)
            if need.teacher_keys
            else None,
            subtract_entropy=None,
        )
        by_own_student = by_own_teacher = None
        if own_student is not None:
            by_logits = _by_own_logits(
                own_student, own_teacher, loss, lse_student, lse_teacher, call.subtract_entropy
            )
            by_own_student, by_own_teacher = (
                None if derivative is None else dout * derivative for derivative in by_logits
            )
        return by_own_student, by_own_teacher, None, None, None, None, *grads


def _check(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor,
    teacher_keys: Tensor | None,
    *,
    own_keys: Tensor | None,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    normalize: bool,
    divergence: str,
    exclude: Tensor | None,
    num_keys: int | Tensor | None,
    sample_mask: Tensor | None,
    reduction: str,
) -> tuple[torch.dtype, float | Tensor, float | Tensor]:
    """Everything but the numbers inside tensors; returns the common dtype and both temperatures."""
    _key_bank.check_bank("keys", keys, "student", student)
    _checks.matrix("teacher", teacher)
    _checks.same_device("teacher", teacher, "student", student)
    _checks.same_leading("teacher", teacher, "student", student)
    if teacher_keys is not None:
        _key_bank.check_bank("teacher_keys", teacher_keys, "teacher", teacher)
        _checks.same_leading("teacher_keys", teacher_keys, "keys", keys)
    elif teacher.shape[1] != keys.shape[1]:
        raise ValueError(
            f"teacher must have {keys.shape[1]} columns like keys, or teacher_keys of its own, "
            f"got {teacher.shape[1]}"
        )
    if own_keys is not None:
        if teacher_keys is not None:
            raise ValueError("own_keys must be None where there are teacher_keys, got both")
        _key_bank.check_meeting("own_keys", own_keys, "teacher", teacher)
        _checks.same_leading("own_keys", own_keys, "student", student)
    _key_bank.check_num_keys(num_keys, keys)
    by_student = _key_bank.temperature("student_temperature", student_temperature, student)
    by_teacher = _key_bank.temperature("teacher_temperature", teacher_temperature, student)
    _checks.flag("normalize", normalize)
    _checks.choice("divergence", divergence, DIVERGENCES)
    _checks.choice("reduction", reduction, _key_bank.REDUCTIONS)
    if exclude is not None:
        _checks.labels("exclude", exclude, "student", student)
    _checks.sample_mask(sample_mask, "student", student)
    given = (x for x in (student, teacher, keys, teacher_keys, own_keys) if x is not None)
    return _checks.common_dtype(*(x.dtype for x in given)), by_student, by_teacher


def apply(
    call: KeyBankCall,
    own_student: Tensor | None,  # [B]
    own_teacher: Tensor | None,  # [B]
    reduction: str,
    backend: str,
) -> Tensor:
    """The loss, from the arguments of the forward operator."""
    others = call.teacher, call.keys, call.teacher_keys
    sweep_again = any(map(_checks.wants_gradient, others))
    return RelationalKLFunction.apply(
        own_student, own_teacher, _checks.wants_gradient(call.student), sweep_again, reduction,
        requested_backend(backend), *call,
    )  # fmt: skip


def _operator_args(
    student: Tensor,
    teacher: Tensor,
    keys: Tensor,
    teacher_keys: Tensor | None,
    own_keys: Tensor | None,
    **options: Any,
) -> tuple[Any, ...]:
    dtype, by, _ = _check(student, teacher, keys, teacher_keys, own_keys=own_keys, **options)
    num_keys, normalize = options["num_keys"], options["normalize"]
    acc = _checks.accumulation_dtype(dtype)
    bank, teacher_bank = (
        _key_bank.form_of_counted(x, num_keys, dtype) for x in (keys, teacher_keys)
    )
    call = KeyBankCall(
        form(student, dtype=acc),
        form(teacher, dtype=acc),
        bank,
        teacher_bank,
        _key_bank.form_of_scale(bank, normalize),
        _key_bank.form_of_scale(teacher_bank, normalize),
        exclude=_key_bank.form_of_index(options["exclude"]),
        num_keys=_key_bank.form_of_index(num_keys if isinstance(num_keys, Tensor) else None),
        subtract_entropy=options["divergence"] == "kl",
    )
    own_logit = None if own_keys is None else form(student, dtype=acc, shape=student.shape[:1])
    return *call, own_logit, own_logit, _key_bank.divided_wants_gradient(student, by)


def gradient_choice(rows: Tensor, by: float | Tensor) -> dict[str, str]:
    if _key_bank.divided_wants_gradient(rows, by):
        return {"gradient": "of the rows in the forward sweep (they require one)"}
    return {"gradient": "none in the forward sweep (the rows require none)"}


def _choices(student: Tensor, student_temperature: float | Tensor, **_: Any) -> dict[str, str]:
    return gradient_choice(student, student_temperature)


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
    sample_mask: Tensor | None = None,  # [B]
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
        teacher: [B, E], on the same device. Of student, teacher and all keys the widest dtype is
            taken where they differ.
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
        sample_mask: Which rows of student, teacher, own_keys and exclude count, bool [B]. The other
            rows may hold anything, cost 0, and their gradient is 0. Nothing waits for a device. The
            keys are those that are given, whatever the mask says. None: all rows.
        reduction: "mean" and "sum" over the rows that count; "none" gives [B].
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
    dtype, by_student, by_teacher = _check(
        student, teacher, keys, teacher_keys, own_keys=own_keys,
        student_temperature=student_temperature, teacher_temperature=teacher_temperature,
        normalize=normalize, divergence=divergence, exclude=exclude, num_keys=num_keys,
        sample_mask=sample_mask, reduction=reduction,
    )  # fmt: skip
    if sample_mask is not None:
        student, teacher = _rows.zeroed(sample_mask, student, teacher)
        if own_keys is not None:
            (own_keys,) = _rows.zeroed(sample_mask, own_keys)
    _key_bank.counting(num_keys, keys)
    if exclude is not None:
        exclude = _key_bank.excluded(exclude, sample_mask, keys)
    x = _key_bank.divided(student.to(dtype), by_student, normalize)
    y = _key_bank.divided(teacher.to(dtype), by_teacher, normalize)
    keys, teacher_keys = (_key_bank.counted(bank, num_keys, dtype) for bank in (keys, teacher_keys))
    own_student = own_teacher = None
    if own_keys is not None:
        own_keys = _key_bank.divided(own_keys.to(dtype), 1.0, normalize)
        own_student, own_teacher = ((rows * own_keys).sum(-1) for rows in (x, y))
    call = KeyBankCall(
        x,
        y,
        keys,
        teacher_keys,
        _key_bank.scale_of(keys, normalize),
        _key_bank.scale_of(teacher_keys, normalize),
        exclude=exclude,
        num_keys=num_keys.long() if isinstance(num_keys, Tensor) else None,
        subtract_entropy=divergence == "kl",
    )
    if sample_mask is None:
        return apply(call, own_student, own_teacher, reduction, backend)
    losses = apply(call, own_student, own_teacher, "none", backend)
    return _rows.reduced(losses, sample_mask, reduction)
