# SPDX-License-Identifier: Apache-2.0
"""Divergence of two softmaxes over similarities to a bank of keys, in plain PyTorch.

`relational_kl` and `info_nce` are the definitions. `relational_kl_fwd` and `relational_kl_bwd` are
the operators in closed form, as derived in docs/ops/relational_kl.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # norms are clamped at it


def relational_kl(
    student: Tensor,  # [B, D]
    teacher: Tensor,  # [B, E]
    keys: Tensor,  # [K, D]
    teacher_keys: Tensor | None = None,  # [K, E]; None: keys, and E = D
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.02,
    normalize: bool = True,
    divergence: str = "kl",
    exclude: Tensor | None = None,  # [B]; -1 for none
) -> Tensor:  # [B]
    """KL(p_teacher || p_student) or the cross-entropy of each row, differentiable by autograd."""
    a = similarities(student, keys, normalize) / student_temperature
    b = similarities(teacher, keys if teacher_keys is None else teacher_keys, normalize)
    b = b / teacher_temperature
    out = _excluded(exclude, len(student), len(keys), a.device)
    log_q, log_p = (z.masked_fill(out, -torch.inf).log_softmax(-1) for z in (a, b))
    c = log_p - log_q if divergence == "kl" else -log_q
    rows = (log_p.exp() * c.masked_fill(out, 0.0)).sum(-1)
    return rows.where(~out.all(-1), 0.0)  # no key is left: no divergence


def info_nce(
    queries: Tensor,  # [B, D]
    keys: Tensor,  # [K, D]
    positives: Tensor,  # [B]
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
) -> Tensor:  # [B]
    """Cross-entropy of each row against its one positive key, differentiable by autograd."""
    a = similarities(queries, keys, normalize) / temperature
    return F.cross_entropy(a, positives.long(), reduction="none")


def similarities(x: Tensor, keys: Tensor, normalize: bool) -> Tensor:  # [B, K]
    """Inner products, or cosines."""
    if normalize:
        x, keys = (F.normalize(z, dim=-1, eps=EPS) for z in (x, keys))
    return x @ keys.mT


def relational_kl_fwd(
    student: Tensor,  # [B, D]
    teacher: Tensor | None,  # [B, E]
    keys: Tensor,  # [K, D]
    teacher_keys: Tensor | None,  # [K, E]
    key_scale: Tensor | None,  # [K]
    teacher_key_scale: Tensor | None,  # [K]
    positives: Tensor | None,  # [B]
    exclude: Tensor | None,  # [B]
    subtract_entropy: bool,
    with_dloss: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, a, out = _side(student, keys, key_scale, exclude)
    lse_student = a.logsumexp(-1)
    log_q = a - lse_student[:, None]
    if teacher is None:
        p, c, lse_teacher = _one_hot(positives, a), -log_q, a.new_zeros(len(a))
    else:
        _, b, _ = _teacher_side(teacher, keys, teacher_keys, key_scale, teacher_key_scale, exclude)
        lse_teacher = b.logsumexp(-1)
        log_p = b - lse_teacher[:, None]
        p, c = log_p.exp(), (log_p - log_q if subtract_entropy else -log_q)
    loss = (p * c).masked_fill(out, 0.0).sum(-1).where(~out.all(-1), 0.0)
    dloss = student.new_empty(0)
    if with_dloss:
        dloss = (log_q.exp() - p).masked_fill(out, 0.0) @ q
    return loss, dloss, lse_student, lse_teacher


def relational_kl_bwd(
    dout: Tensor,  # [B]
    student: Tensor,  # [B, D]
    teacher: Tensor | None,  # [B, E]
    keys: Tensor,  # [K, D]
    teacher_keys: Tensor | None,  # [K, E]
    key_scale: Tensor | None,  # [K]
    teacher_key_scale: Tensor | None,  # [K]
    positives: Tensor | None,  # [B]
    exclude: Tensor | None,  # [B]
    subtract_entropy: bool,
    loss: Tensor,  # [B]
    dloss: Tensor,  # [B, D] or empty
    lse_student: Tensor,  # [B]
    lse_teacher: Tensor,  # [B]
    need_student: bool,
    need_teacher: bool,
    need_keys: bool,
    need_teacher_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dy, dq, dr = (student.new_empty(0) for _ in range(4))
    if need_student:
        dx = (dout[:, None] * dloss).contiguous()
    if not (need_teacher or need_keys or need_teacher_keys):
        return dx, dy, dq, dr
    _, a, out = _side(student, keys, key_scale, exclude)
    log_q = a - lse_student[:, None]
    h = None
    if teacher is None:
        p = _one_hot(positives, a)
    else:
        r, b, _ = _teacher_side(teacher, keys, teacher_keys, key_scale, teacher_key_scale, exclude)
        log_p = b - lse_teacher[:, None]
        p, c = log_p.exp(), (log_p - log_q if subtract_entropy else -log_q)
        h = dout[:, None] * (p * (c - loss[:, None])).masked_fill(out, 0.0)
    if need_teacher:
        dy = h @ r
    if need_keys:
        g = (log_q.exp() - p).masked_fill(out, 0.0)
        dq = (dout[:, None] * g).mT @ student
        if teacher is not None and teacher_keys is None:
            dq = dq + h.mT @ teacher
    if need_teacher_keys:
        dr = h.mT @ teacher
    return dx, dy, dq, dr


def _excluded(exclude: Tensor | None, B: int, K: int, device: torch.device) -> Tensor:  # [B, K]
    if exclude is None:
        return torch.zeros(B, K, dtype=torch.bool, device=device)
    return exclude[:, None] == torch.arange(K, device=device)


def _one_hot(positives: Tensor, a: Tensor) -> Tensor:  # [B, K]
    """A positive that names no key makes its row NaN."""
    hot = (positives[:, None] == torch.arange(a.shape[1], device=a.device)).to(a.dtype)
    return hot.where(hot.any(-1, keepdim=True), torch.nan)


def _side(
    x: Tensor, keys: Tensor, scale: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled keys in the accumulation dtype, logits [B, K], and which of them do not count."""
    q = keys.to(x.dtype)
    q = q if scale is None else q * scale[:, None]
    out = _excluded(exclude, len(x), len(q), x.device)
    return q, (x @ q.mT).masked_fill(out, -torch.inf), out


def _teacher_side(
    teacher: Tensor,
    keys: Tensor,
    teacher_keys: Tensor | None,
    key_scale: Tensor | None,
    teacher_key_scale: Tensor | None,
    exclude: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if teacher_keys is None:
        return _side(teacher, keys, key_scale, exclude)
    return _side(teacher, teacher_keys, teacher_key_scale, exclude)
