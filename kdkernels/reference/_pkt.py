# SPDX-License-Identifier: Apache-2.0
"""Probabilistic knowledge transfer, in plain PyTorch.

`pkt` is the definition. `pkt_fwd` is the operator in closed form, as derived in docs/ops/pkt.md,
whose names it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kdkernels.reference._definition import counting, definition
from kdkernels.reference._distances import distances, gradients_of_pairs
from kdkernels.reference._rows import norms

# Of the two public codes, by the divergence that each of them uses.
NORM_EPS = {"kl": 1e-7, "jeffreys": 1e-6}
LOG_EPS = {"kl": 1e-7, "jeffreys": 0.0}
DISTANCE_EPS = 1e-6


@definition
def pkt(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    *,
    kernel: Literal["cosine", "student_t"] = "cosine",
    divergence: Literal["kl", "jeffreys"] = "kl",
    sample_mask: Tensor | None = None,  # [B]
) -> Tensor:
    """Mean over B^2 of the divergence's terms, differentiable by autograd; the teacher is
    detached."""
    student, teacher = counting(sample_mask, student, teacher.detach())
    return by_distances(student, teacher, kernel, divergence, _squared_distances)


def _squared_distances(x: Tensor) -> Tensor:  # [B, D] -> [B, B]
    d2 = (x[:, None] - x).square().sum(2)
    return torch.where(torch.isfinite(x).all(1), d2, torch.nan)  # a row less itself is not 0 then


def by_distances(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    kernel: str,
    divergence: str,
    squared_distances: Callable[[Tensor], Tensor],  # [B, D] -> [B, B]
) -> Tensor:
    """`pkt` with any way to compute distances."""

    def probabilities(x: Tensor) -> Tensor:  # [B, B]
        if kernel == "cosine":
            u = x / (norms(x, keepdim=True) + NORM_EPS[divergence])
            k = (u @ u.T + 1) / 2
        else:
            k = 1 / (1 + (squared_distances(x) + DISTANCE_EPS).sqrt())
        return k / k.sum(1, keepdim=True)

    terms = terms_of(probabilities(student), probabilities(teacher), divergence)
    return terms.sum() / max(len(student) ** 2, 1)


def terms_of(p: Tensor, q: Tensor, divergence: str) -> Tensor:
    """What the divergence adds up."""
    eps = LOG_EPS[divergence]
    if divergence == "kl":
        return q * ((q + eps) / (p + eps)).log()
    return (q - p) * (q.log() - p.log())


def pkt_fwd(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    kernel: str,
    divergence: str,
    need_student: bool,
) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t, eps = student.to(acc), teacher.to(acc), NORM_EPS[divergence]
    if kernel == "cosine":
        u, k_s, z_s = _cosine(s, eps)
        _, k_t, z_t = _cosine(t, eps)
    else:
        d2, k_s, z_s = _student_t(s)
        _, k_t, z_t = _student_t(t)
    p, q = k_s / z_s, k_t / z_t
    loss, slope = _terms(p, q, divergence)
    loss = loss.sum()
    if not need_student:
        return loss, s.new_empty(0)
    r = (slope * p).sum(1, keepdim=True)
    gk = (slope - r) / z_s
    gk = gk + gk.T
    if kernel == "cosine":
        return loss, _cosine_backward(s, gk @ u / 2, eps)
    d = (d2.double() + DISTANCE_EPS).sqrt()
    # dK/dd^2 = -K^2 / (2 d), and nothing between rows that do not differ
    w = torch.where(d2 == 0, 0.0, -gk * k_s.square() / (2 * d))
    return loss, gradients_of_pairs(w, d2, s, s, "sqeuclidean")[0]


def _cosine(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(u [B, D], K [B, B], Z [B, 1])"""
    norm = norms(x, keepdim=True)
    u = x / (norm + eps)
    a = eps / (norm + eps)  # 1 - |u|, without the subtraction
    # Rounding must not take K below what it can be: rows that point apart have almost 0.
    k = torch.maximum((u @ u.T + 1) / 2, (a + a.T - a * a.T) / 2)
    return u, k, (u @ u.sum(0)[:, None] + len(x)) / 2


def _student_t(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d^2 from differences [B, B], K [B, B], Z [B, 1])"""
    d2 = distances(x, x, "sqeuclidean")
    k = 1 / (1 + (d2 + DISTANCE_EPS).sqrt())
    return d2, k, k.sum(1, keepdim=True)


def _terms(p: Tensor, q: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """Terms of the sum, and their derivatives by p, of "kl" plus 1: a constant in a row changes
    nothing, and like this the difference of nearly equal numbers is taken once, of q and p."""
    if divergence == "kl":
        eps = LOG_EPS["kl"]
        return q * ((q + eps) / (p + eps)).log(), ((p - q) + eps) / (p + eps)
    log = (q / p).log()
    return (q - p) * log, (p - q) / p - log


def _cosine_backward(x: Tensor, gu: Tensor, eps: float) -> Tensor:
    """Through u = x / (|x| + eps), whose derivative at 0 is 1 / eps."""
    # in fp64: the radial part that is taken away can be much larger than what remains
    wide, x = gu.double(), x.double()
    norm = norms(x, keepdim=True)
    radial = (wide * x).sum(1, keepdim=True) / torch.where(norm > 0, norm, 1.0)
    return ((wide - x * radial / (norm + eps)) / (norm + eps)).to(gu.dtype)
