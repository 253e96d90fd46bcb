# SPDX-License-Identifier: Apache-2.0
"""Divergence of two softmaxes over similarities to a bank of keys, in plain PyTorch.

`relational_kl` and `info_nce` are the definitions. `relational_kl_fwd` and `relational_kl_bwd` are
the operators in closed form, as derived in docs/ops/relational_kl.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels._checks import accumulation_dtype
from kdkernels._key_bank_call import KeyBankCall, RowNumbers
from kdkernels._similarity import NORM_EPS, norms
from kdkernels.reference._definition import definition, reduced
from kdkernels.reference._rows import similarities


@definition
def relational_kl(
    student: Tensor,  # [B, D]
    teacher: Tensor,  # [B, E]
    keys: Tensor,  # [K, D]
    teacher_keys: Tensor | None = None,  # [K, E]; None: keys, and E = D
    *,
    own_keys: Tensor | None = None,  # [B, D]; one more key per row, of both sides
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.02,
    normalize: bool = True,
    divergence: Literal["kl", "cross_entropy"] = "kl",
    exclude: Tensor | None = None,  # [B]; -1 for none
    num_keys: int | Tensor | None = None,  # the first of the keys
    sample_mask: Tensor | None = None,  # [B]
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:  # [] or [B]
    """KL(p_teacher || p_student) or the cross-entropy of each row, differentiable by autograd."""
    keys, teacher_keys = (first(x, num_keys) for x in (keys, teacher_keys))
    student, teacher, own_keys = (zeroed(sample_mask, x) for x in (student, teacher, own_keys))
    a = similarities(student, keys, normalize)
    b = similarities(teacher, keys if teacher_keys is None else teacher_keys, normalize)
    out = not_counting(*a.shape, a.device, exclude)
    if own_keys is not None:
        a, b = (
            torch.cat([z, own_similarities(x, own_keys, normalize)], 1)
            for z, x in ((a, student), (b, teacher))
        )
        out = F.pad(out, (0, 1))
    a, b = a / student_temperature, b / teacher_temperature
    log_q, log_p = (z.masked_fill(out, -torch.inf).log_softmax(-1) for z in (a, b))
    c = log_p - log_q if divergence == "kl" else -log_q
    rows = (log_p.exp() * c.masked_fill(out, 0.0)).sum(-1)
    rows = rows.where(~out.all(-1), 0.0)  # no key is left: no divergence
    return reduced(rows, reduction, sample_mask)


@definition
def info_nce(
    queries: Tensor,  # [B, D]
    keys: Tensor,  # [K, D]
    positives: Tensor | None = None,  # [B]; None: the own keys
    *,
    key_labels: Tensor | None = None,  # [K]; positives are labels then
    own_keys: Tensor | None = None,  # [B, D]; one more key per row, a positive one
    exclude: Tensor | None = None,  # [B], -1 for none, or a mask [B, K]
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    num_keys: int | Tensor | None = None,
    sample_mask: Tensor | None = None,  # [B]
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:  # [] or [B]
    """Mean cross-entropy of each row against its positive keys, differentiable by autograd."""
    queries, own_keys = zeroed(sample_mask, queries), zeroed(sample_mask, own_keys)
    a = similarities(queries, first(keys, num_keys), normalize)
    out = not_counting(*a.shape, a.device, exclude)
    positive = positive_keys(positives, key_labels, out)
    if own_keys is not None:
        a = torch.cat([a, own_similarities(queries, own_keys, normalize)], 1)
        positive, out = F.pad(positive, (0, 1), value=True), F.pad(out, (0, 1))
    out = out & ~out.all(-1, keepdim=True)  # a row that no key is left for is replaced below
    log_q = (a / temperature).masked_fill(out, -torch.inf).log_softmax(-1)
    count = positive.sum(-1)
    rows = -log_q.masked_fill(~positive, 0.0).sum(-1) / count.clamp_min(1)
    rows = rows.where(count > 0, 0.0 if key_labels is not None else torch.nan)
    return reduced(rows, reduction, sample_mask)


def zeroed(sample_mask: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Rows that do not count may hold anything."""
    return rows if sample_mask is None or rows is None else rows.where(sample_mask[:, None], 0.0)


def positive_keys(
    positives: Tensor | None,  # [B]
    key_labels: Tensor | None,  # [K]
    out: Tensor,  # [B, K]
) -> Tensor:  # [B, K]
    """Which of the keys are positive: by index, or by label."""
    if positives is None:
        return torch.zeros_like(out)
    K = out.shape[1]
    names = torch.arange(K, device=out.device) if key_labels is None else key_labels[:K]
    return (positives[:, None] == names) & ~out


def first(keys: Tensor | None, num_keys: int | Tensor | None) -> Tensor | None:
    return keys if keys is None or num_keys is None else keys[: int(num_keys)]


def own_similarities(x: Tensor, own_keys: Tensor, normalize: bool) -> Tensor:  # [B, 1]
    """Of each row and its key in `own_keys`."""
    return similarities(x[:, None], own_keys[:, None].to(x.dtype), normalize)[:, 0]


def relational_kl_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *args, student_temperature, teacher_temperature, need_student = args
    call = KeyBankCall(*args)
    out = _not_counting_of(call)
    known = _scales(call, student_temperature, teacher_temperature)
    own_student, own_teacher = None, None
    if call.own_keys is not None:
        own_student = known.own_student
        own_teacher = None if call.teacher is None else known.own_teacher
    key_scales = _key_scales(call)
    q, a = _student_side(call, known, key_scales, out)
    lse_student = _log_sum_exp(a, own_student)
    log_q, _ = _softmax(a, lse_student, out)
    of_student = _probabilities(a, own_student, out)
    if call.teacher is None:
        p, lse_teacher = _one_hot(call.positives, out, a.dtype), a.new_zeros(len(a))
        c = (-log_q).masked_fill(p == 0, 0.0)  # infinite where another key is infinitely far
    else:
        _, b = _teacher_side(call, known, key_scales, out)
        lse_teacher = _log_sum_exp(b, own_teacher)
        log_p, _ = _softmax(b, lse_teacher, out)
        p = _probabilities(b, own_teacher, out)
        c = log_p - log_q if call.subtract_entropy else -log_q
    loss, total = (p * c).sum(-1), p.sum(-1)
    if own_teacher is not None:
        log_q, log_p = own_student - lse_student, own_teacher - lse_teacher
        loss = loss + log_p.exp() * (log_p - log_q if call.subtract_entropy else -log_q)
        total = total + log_p.exp()
    elif call.teacher is None and call.positives is None:
        loss = lse_student if own_student is None else lse_student - own_student
        loss = loss.where(lse_student != -torch.inf, 0.0)  # no key is left
    # The rounding of large logits leaves a sum of p that is not quite 1. Of the mean of c that the
    # gradient subtracts, only the one with these p cancels. The sum is 0 where no key is left.
    loss = loss / torch.where(total == 0, 1.0, total)
    dloss = (of_student - p) @ q if need_student else loss.new_empty(0)
    known = known._replace(lse_student=lse_student, lse_teacher=lse_teacher)
    return loss, dloss, torch.stack(known), key_scales


def relational_kl_bwd(
    dout: Tensor,  # [B]
    *args: Any,
) -> tuple[Tensor, ...]:
    (
        *args, loss, dloss, numbers, key_scales, need_student, need_teacher, need_keys,
        need_teacher_keys, need_own_keys, need_student_factor, need_teacher_factor,
    ) = args  # fmt: skip
    call, known = KeyBankCall(*args), RowNumbers(*numbers)
    own_of_student, own_of_teacher = _by_own_logits(call, known, loss)
    dx, dy, dq, dr, do = (call.student.new_empty(0) for _ in range(5))
    by_student_factor, by_teacher_factor = (dout.new_empty(0) for _ in range(2))
    through_own = None if call.own_keys is None else _unit_own(call, known)
    if need_student or need_student_factor:
        v = dout[:, None] * dloss
        if through_own is not None:
            v = v + (dout * own_of_student)[:, None] * through_own
        if need_student_factor:
            along = _along(v, call.student, known.student_scale)
            by_student_factor = -along / call.student_factor
        if need_student:
            dx = _through_scale(v, call.student, known.student_scale, call.normalize)
    if need_own_keys:
        v = (dout * own_of_student)[:, None] * _scaled(call.student, known.student_scale)
        if call.teacher is not None:
            of_teacher = _scaled(call.teacher, known.teacher_scale)
            v = v + (dout * own_of_teacher)[:, None] * of_teacher
        do = _through_scale(v, call.own_keys, known.own_scale, call.normalize)
    need_teacher_rows = need_teacher or need_teacher_factor
    if not (need_teacher_rows or need_keys or need_teacher_keys):
        return dx, dy, dq, dr, do, by_student_factor, by_teacher_factor
    out = _not_counting_of(call)
    _, a = _student_side(call, known, key_scales, out)
    log_q, of_student = _softmax(a, known.lse_student, out)
    h = None
    if call.teacher is None:
        p = _one_hot(call.positives, out, a.dtype)
    else:
        r, b = _teacher_side(call, known, key_scales, out)
        log_p, p = _softmax(b, known.lse_teacher, out)
        c = log_p - log_q if call.subtract_entropy else -log_q
        h = dout[:, None] * p * (c - loss[:, None])
    if need_teacher_rows:
        v = h @ r
        if through_own is not None:
            v = v + (dout * own_of_teacher)[:, None] * through_own
        if need_teacher_factor:
            along = _along(v, call.teacher, known.teacher_scale)
            by_teacher_factor = -along / call.teacher_factor
        if need_teacher:
            dy = _through_scale(v, call.teacher, known.teacher_scale, call.normalize)
    if need_keys:
        v = (dout[:, None] * (of_student - p)).mT @ _scaled(call.student, known.student_scale)
        if call.teacher is not None and call.teacher_keys is None:
            v = v + h.mT @ _scaled(call.teacher, known.teacher_scale)
        dq = _by_keys(v, call.keys, key_scales[:1], call)
    if need_teacher_keys:
        v = h.mT @ _scaled(call.teacher, known.teacher_scale)
        dr = _by_keys(v, call.teacher_keys, key_scales[1:], call)
    return dx, dy, dq, dr, do, by_student_factor, by_teacher_factor


def _scales(
    call: KeyBankCall, student_temperature: float, teacher_temperature: float
) -> RowNumbers:
    """The scales of rows, and the logits of their own keys."""
    acc = accumulation_dtype(call.student.dtype)
    none = call.student.new_zeros(len(call.student), dtype=acc)

    def scale(x: Tensor | None, temperature: float, factor: Tensor | None) -> Tensor:
        if x is None:
            return none
        by = _norm(x.to(acc)) if call.normalize else torch.ones_like(none)
        return (by * temperature * (1.0 if factor is None else factor)).reciprocal()

    of_student = scale(call.student, student_temperature, call.student_factor)
    of_teacher = scale(call.teacher, teacher_temperature, call.teacher_factor)
    found = RowNumbers(none, none, of_student, of_teacher, none, none, none)
    if call.own_keys is None:
        return found
    found = found._replace(own_scale=scale(call.own_keys, 1.0, None))
    own = _unit_own(call, found)
    found = found._replace(own_student=(_scaled(call.student, of_student) * own).sum(-1))
    if call.teacher is None:
        return found
    return found._replace(own_teacher=(_scaled(call.teacher, of_teacher) * own).sum(-1))


def _norm(x: Tensor) -> Tensor:  # [B]
    return norms(x).clamp_min(NORM_EPS)


def _key_scales(call: KeyBankCall) -> Tensor:  # [n, K]
    acc = accumulation_dtype(call.keys.dtype)
    if not call.normalize:
        return call.keys.new_empty((0, len(call.keys)), dtype=acc)
    banks = (x for x in (call.keys, call.teacher_keys) if x is not None)
    return torch.stack([_norm(x.to(acc)).reciprocal() for x in banks])


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    return x.to(scale.dtype) * scale[:, None]


def _unit_own(call: KeyBankCall, known: RowNumbers) -> Tensor:  # [B, D]
    return _scaled(call.own_keys, known.own_scale)


def _by_own_logits(
    call: KeyBankCall,
    known: RowNumbers,
    loss: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """Derivatives of the loss by the own key's logits, which enter it like those of any key."""
    log_q, log_p = known.own_student - known.lse_student, known.own_teacher - known.lse_teacher
    if call.teacher is None:  # the own key is the positive one
        return log_q.expm1(), log_p
    p, c = log_p.exp(), (log_p - log_q if call.subtract_entropy else -log_q)
    return log_q.exp() - p, p * (c - loss)


def _through_scale(
    v: Tensor,  # [n, D] by the rows times their scales
    x: Tensor,  # [n, D]
    scale: Tensor,  # [n]
    normalize: bool,
) -> Tensor:  # [n, D]
    """The gradient by the rows themselves. A norm that is clamped is a constant."""
    if normalize:
        rows = x.to(v.dtype)
        unit = rows / _norm(rows)[:, None]
        along = (unit * v).sum(-1).where(norms(rows) >= NORM_EPS, 0.0)
        v = v - unit * along[:, None]
    return (v * scale[:, None]).to(x.dtype).contiguous()


def _along(v: Tensor, x: Tensor, scale: Tensor) -> Tensor:  # [n]
    """The derivative of each row's loss by the logarithm of its scale."""
    return (_scaled(x, scale) * v).sum(-1)


def _by_keys(
    v: Tensor,  # [K, D]
    keys: Tensor,  # [K, D]
    scale: Tensor,  # [1, K], or [0, K] where keys have none
    call: KeyBankCall,
) -> Tensor:  # [K, D]
    v = _through_scale(v, keys, scale[0], True) if len(scale) > 0 else v.to(keys.dtype)
    if call.num_keys is not None:  # norms of what does not count may be anything
        beyond = torch.arange(len(keys), device=keys.device) >= call.num_keys
        v = v.masked_fill(beyond[:, None], 0.0)
    return v


def not_counting(
    B: int,
    K: int,
    device: torch.device,
    exclude: Tensor | None,  # [B], or a mask of at least K columns
    num_keys: Tensor | None = None,  # []
) -> Tensor:  # [B, K]
    k = torch.arange(K, device=device)
    out = torch.zeros(B, K, dtype=torch.bool, device=device)
    if exclude is not None:
        out = exclude[:, :K] if exclude.dtype == torch.bool else exclude[:, None] == k
    return out if num_keys is None else out | (k >= num_keys)


def _not_counting_of(call: KeyBankCall) -> Tensor:  # [B, K]
    B, K = len(call.student), len(call.keys)
    return not_counting(B, K, call.student.device, call.exclude, call.num_keys)


def _one_hot(positives: Tensor | None, out: Tensor, dtype: torch.dtype) -> Tensor:  # [B, K]
    """0 without positives. A positive that names no key that counts makes its row NaN."""
    if positives is None:
        return torch.zeros_like(out, dtype=dtype)
    hot = (positives[:, None] == torch.arange(out.shape[1], device=out.device)) & ~out
    return hot.to(dtype).where(hot.any(-1, keepdim=True), torch.nan)


def _softmax(logits: Tensor, lse: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms and probabilities, [B, K]; 0 where a key does not count."""
    log = logits - lse[:, None]
    return log.masked_fill(out, 0.0), log.exp().masked_fill(out, 0.0)


def _probabilities(logits: Tensor, own_logit: Tensor | None, out: Tensor) -> Tensor:  # [B, K]
    """As `_softmax` has them, but with their sum as it is: the rounding of its logarithm is common
    to a row, and near convergence larger than the difference of both sides."""
    most = logits.amax(-1)
    if own_logit is not None:
        most = torch.maximum(most, own_logit)
    weights = (logits - most[:, None]).exp()
    total = weights.sum(-1)
    if own_logit is not None:
        total = total + (own_logit - most).exp()
    return (weights / total[:, None]).masked_fill(out, 0.0)


def _log_sum_exp(logits: Tensor, own_logit: Tensor | None) -> Tensor:  # [B]
    among_keys = logits.logsumexp(-1)
    return among_keys if own_logit is None else torch.logaddexp(among_keys, own_logit)


def _side(
    x: Tensor, keys: Tensor, scale: Tensor, out: Tensor, num_keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scaled keys in the accumulation dtype, and logits [B, K]."""
    q = keys.to(x.dtype)
    q = q * scale[0, :, None] if len(scale) > 0 else q
    if num_keys is not None:  # what lies beyond may be anything
        q = q.masked_fill((torch.arange(len(q), device=q.device) >= num_keys)[:, None], 0.0)
    return q, (x @ q.mT).masked_fill(out, -torch.inf)


def _student_side(
    call: KeyBankCall, known: RowNumbers, key_scales: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    rows = _scaled(call.student, known.student_scale)
    return _side(rows, call.keys, key_scales[:1], out, call.num_keys)


def _teacher_side(
    call: KeyBankCall, known: RowNumbers, key_scales: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    keys, scale = call.teacher_keys, key_scales[1:]
    if keys is None:
        keys, scale = call.keys, key_scales[:1]
    rows = _scaled(call.teacher, known.teacher_scale)
    return _side(rows, keys, scale, out, call.num_keys)
