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
from kdkernels._key_bank_call import KeyBankCall, RowNumbers
from kdkernels._library import define_operator, first_order
from kdkernels.ops import _key_bank, _rows

DIVERGENCES = ("kl", "cross_entropy")
# The operators take student [B, D] and teacher [B, E] as they are, of the dtype of the keys. Each
# row has a scale: 1 / (norm temperature factor), without the norm unless `normalize`; the
# temperature is a number, the factor a tensor without dimensions, or None for 1. A key is divided
# by its norm if `normalize`. The logits are the inner products of rows and keys times their scales,
#     a of student and keys                  [B, K], and
#     b of teacher and teacher_keys          [B, K], or `keys` where teacher_keys is None.
# A softmax of each row of a and of b runs over the keys that count: the first num_keys (int64
# without dimensions, on the device; None: all), less the key `exclude` of the row (-1: none). The
# key own_keys [B, D] of each row, where given, is one more key of its row on both sides. The
# teacher's probabilities are p = softmax(b). Where teacher is None, p is 1 at the row's key
# `positives`; where that is None too, at its own key; with neither, p is 0, so that the loss is
# the log-sum-exp of a. There `exclude` may be a bool mask [B, K] of keys that do not count, which
# holds no row's positive. Results of the forward, the same for every backend; fp64 for fp64 inputs,
# else fp32:
#   loss        [B]     sum_k p_k c_k with c = subtract_entropy log p - log softmax(a)
#   dloss       [B, D]  its derivative by the student times its scale, without what the own key
#                       adds; empty (0) unless need_student
#   numbers     [7, B]  `RowNumbers`: log-sum-exp of a and of b, the scales of student, teacher and
#                       own key (1 / norm), and the own key's logits; 0 where there is no such thing
#   key_scales  [n, K]  1 / norm of keys and of teacher_keys, if there are any; n = 0 unless
#                       `normalize`
# A row that no key is left for has loss and derivatives of 0, and its other residuals are not
# read. A positive that names no key that counts makes its row NaN. The backward scales dloss by
# rows for the student, and takes out the part along the row where a norm is divided by. Other
# gradients take a second sweep over the keys, except that of own_keys. They are those of the
# arguments themselves, in their dtype; derivatives by the factors are [B], to be summed. Keys that
# do not count may hold anything, and their gradient is 0.


def _fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    *call, _, _, need_student, _ = args
    call = KeyBankCall(*call)
    student, (B, K) = call.student, (call.student.shape[0], call.keys.shape[0])
    dtype = _checks.accumulation_dtype(student.dtype)
    banks = 1 if call.teacher_keys is None else 2
    return (
        student.new_empty(B, dtype=dtype),
        student.new_empty(student.shape if need_student else (0,), dtype=dtype),
        student.new_empty((len(RowNumbers._fields), B), dtype=dtype),
        student.new_empty((banks if call.normalize else 0, K), dtype=dtype),
    )


def _bwd_fake(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *call, _, _, _, _, _, _, _, _, _, of_student, of_teacher, _ = args
    call, needs = KeyBankCall(*call), args[-8:-3]
    like = (call.student, call.teacher, call.keys, call.teacher_keys, call.own_keys)
    return (
        *(
            call.student.new_empty(x.shape if needed else (0,))
            for x, needed in zip(like, needs, strict=True)
        ),
        *(dout.new_empty(dout.shape if needed else (0,)) for needed in (of_student, of_teacher)),
    )


_IN_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool"}
_CALL = ", ".join(
    f"{_IN_SCHEMA[hint]} {name}" for name, hint in get_type_hints(KeyBankCall).items()
)
# In the order of the results of the backward.
_DIFFERENTIABLE = (
    "student", "teacher", "keys", "teacher_keys", "own_keys", "student_factor", "teacher_factor",
)  # fmt: skip
_fwd = define_operator(
    "relational_kl",
    "fwd",
    f"({_CALL}, float student_temperature, float teacher_temperature, bool need_student, "
    "str backend) -> (Tensor loss, Tensor dloss, Tensor numbers, Tensor key_scales)",
    _fwd_fake,
)
_bwd = define_operator(
    "relational_kl",
    "bwd",
    f"(Tensor dout, {_CALL}, Tensor loss, Tensor dloss, Tensor numbers, Tensor key_scales, "
    f"{', '.join(f'bool need_{name}' for name in _DIFFERENTIABLE)}, str backend) -> "
    f"({', '.join(f'Tensor d{name}' for name in _DIFFERENTIABLE)})",
    _bwd_fake,
)


class RelationalKLFunction(KernelFunction):
    """Attaches the operator pair to autograd, and the reduction to both."""

    @staticmethod
    def forward(
        ctx: Any,
        student_temperature: float,
        teacher_temperature: float,
        need_student: bool,
        sweep_again: bool,
        reduction: str,
        backend: str,
        *args: Any,
    ) -> Tensor:
        call = KeyBankCall(*args)
        loss, *others = _fwd(*call, student_temperature, teacher_temperature, need_student, backend)
        # A backward that sweeps over no keys reads none: a queue may move on before it. Its
        # operator receives the student in the place of the keys.
        kept = call if sweep_again else call._replace(
            keys=call.student, teacher_keys=None, positives=None, exclude=None, num_keys=None,
            teacher=None if call.own_keys is None else call.teacher,
        )  # fmt: skip
        *tensors, _, _ = kept
        keep_for_backward(ctx, loss, *others, *tensors)
        ctx.normalize, ctx.subtract_entropy = call.normalize, call.subtract_entropy
        B = call.student.shape[0]
        ctx.scale, ctx.backend = 1 / max(B, 1) if reduction == "mean" else 1.0, backend
        if reduction == "none":
            # a copy, since the backward reads the losses and users change theirs in place
            return loss.clone()
        return loss.mean() if reduction == "mean" and B > 0 else loss.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, kept: tuple[Tensor | None, ...], dout: Tensor) -> tuple[Any, ...]:
        loss, dloss, numbers, key_scales, *tensors = kept
        call = KeyBankCall(*tensors, ctx.normalize, ctx.subtract_entropy)
        need = KeyBankCall(*ctx.needs_input_grad[-len(KeyBankCall._fields) :])
        needs = [getattr(need, name) for name in _DIFFERENTIABLE]
        if ctx.scale != 1.0:
            dout = dout * ctx.scale
        grads = _bwd(
            dout.expand(call.student.shape[0]), *call, loss, dloss, numbers, key_scales, *needs,
            ctx.backend,
        )  # fmt: skip
        *of_rows, of_student, of_teacher = (
            grad if needed else None for grad, needed in zip(grads, needs, strict=True)
        )
        by_factors = (None if x is None else x.sum() for x in (of_student, of_teacher))
        return *(None,) * 6, *of_rows, None, None, None, *by_factors, None, None


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
    student_temperature: float,
    teacher_temperature: float,
    reduction: str,
    backend: str,
) -> Tensor:
    """The loss, from the arguments of the forward operator."""
    call = _key_bank.apart(call)
    others = call.teacher, call.keys, call.teacher_keys, call.teacher_factor
    need_student, sweep_again = (
        any(map(_checks.wants_gradient, sources))
        for sources in ((call.student, call.student_factor), others)
    )
    return RelationalKLFunction.apply(
        student_temperature, teacher_temperature, need_student, sweep_again, reduction,
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
    dtype, by_student, by_teacher = _check(
        student, teacher, keys, teacher_keys, own_keys=own_keys, **options
    )
    num_keys = options["num_keys"]
    call = KeyBankCall(
        form(student, dtype=dtype),
        form(teacher, dtype=dtype),
        _key_bank.form_of_counted(keys, num_keys, dtype),
        _key_bank.form_of_counted(teacher_keys, num_keys, dtype),
        None if own_keys is None else form(own_keys, dtype=dtype),
        exclude=_key_bank.form_of_index(options["exclude"]),
        num_keys=_key_bank.form_of_index(num_keys if isinstance(num_keys, Tensor) else None),
        student_factor=_key_bank.form_of_factor(by_student, dtype),
        teacher_factor=_key_bank.form_of_factor(by_teacher, dtype),
        normalize=options["normalize"],
        subtract_entropy=options["divergence"] == "kl",
    )
    temperatures = map(_key_bank.number, (by_student, by_teacher))
    return *call, *temperatures, _key_bank.scaled_wants_gradient(student, by_student)


def gradient_choice(rows: Tensor, by: float | Tensor) -> dict[str, str]:
    if _key_bank.scaled_wants_gradient(rows, by):
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
    if own_keys is not None:
        own_keys = own_keys.to(dtype)
    call = KeyBankCall(
        student.to(dtype),
        teacher.to(dtype),
        _key_bank.counted(keys, num_keys, dtype),
        _key_bank.counted(teacher_keys, num_keys, dtype),
        own_keys,
        exclude=exclude,
        num_keys=num_keys.long() if isinstance(num_keys, Tensor) else None,
        student_factor=_key_bank.factor(by_student, dtype),
        teacher_factor=_key_bank.factor(by_teacher, dtype),
        normalize=normalize,
        subtract_entropy=divergence == "kl",
    )
    temperatures = map(_key_bank.number, (by_student, by_teacher))
    if sample_mask is None:
        return apply(call, *temperatures, reduction, backend)
    losses = apply(call, *temperatures, "none", backend)
    return _rows.reduced(losses, sample_mask, reduction)
