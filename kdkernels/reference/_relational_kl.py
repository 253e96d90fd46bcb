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

from kdkernels._key_bank_call import KeyBankCall
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
    *args, own_student, own_teacher, need_student = args
    call = KeyBankCall(*args)
    out = _not_counting_of(call)
    q, a = _student_side(call, out)
    lse_student = _log_sum_exp(a, own_student)
    log_q, _ = _softmax(a, lse_student, out)
    of_student = _probabilities(a, own_student, out)
    if call.teacher is None:
        p, lse_teacher = _one_hot(call.positives, out, a.dtype), a.new_zeros(len(a))
        c = (-log_q).masked_fill(p == 0, 0.0)  # infinite where another key is infinitely far
    else:
        _, b = _teacher_side(call, out)
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
    dloss = (of_student - p) @ q if need_student else call.student.new_empty(0)
    return loss, dloss, lse_student, lse_teacher


def relational_kl_bwd(
    dout: Tensor,  # [B]
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *args, need_student, need_teacher, need_keys, need_teacher_keys = args
    *args, loss, dloss, lse_student, lse_teacher = args
    call = KeyBankCall(*args)
    dx, dy, dq, dr = (call.student.new_empty(0) for _ in range(4))
    if need_student:
        dx = (dout[:, None] * dloss).contiguous()
    if not (need_teacher or need_keys or need_teacher_keys):
        return dx, dy, dq, dr
    out = _not_counting_of(call)
    _, a = _student_side(call, out)
    log_q, of_student = _softmax(a, lse_student, out)
    h = None
    if call.teacher is None:
        p = _one_hot(call.positives, out, a.dtype)
    else:
        r, b = _teacher_side(call, out)
        log_p, p = _softmax(b, lse_teacher, out)
        c = log_p - log_q if call.subtract_entropy else -log_q
        h = dout[:, None] * p * (c - loss[:, None])
    if need_teacher:
        dy = h @ r
    if need_keys:
        dq = (dout[:, None] * (of_student - p)).mT @ call.student
        if call.teacher is not None and call.teacher_keys is None:
            dq = dq + h.mT @ call.teacher
    if need_teacher_keys:
        dr = h.mT @ call.teacher
    return dx, dy, dq, dr


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
    x: Tensor, keys: Tensor, scale: Tensor | None, out: Tensor, num_keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scaled keys in the accumulation dtype, and logits [B, K]."""
    q = keys.to(x.dtype)
    q = q if scale is None else q * scale[:, None]
    if num_keys is not None:  # what lies beyond may be anything
        q = q.masked_fill((torch.arange(len(q), device=q.device) >= num_keys)[:, None], 0.0)
    return q, (x @ q.mT).masked_fill(out, -torch.inf)


def _student_side(call: KeyBankCall, out: Tensor) -> tuple[Tensor, Tensor]:
    return _side(call.student, call.keys, call.key_scale, out, call.num_keys)


def _teacher_side(call: KeyBankCall, out: Tensor) -> tuple[Tensor, Tensor]:
    keys, scale = call.teacher_keys, call.teacher_key_scale
    if keys is None:
        keys, scale = call.keys, call.key_scale
    return _side(call.teacher, keys, scale, out, call.num_keys)
