# SPDX-License-Identifier: Apache-2.0
"""Relational knowledge distillation by distances and by angles, in plain PyTorch.

`rkd_distance` and `rkd_angle` are the definitions; `rkd_fwd` is the operator, with the gradients by
hand, as derived in docs/ops/rkd.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.reference._definition import counting, definition
from kdkernels.reference._distances import distances, gradients_of_pairs, wide
from kdkernels.reference._rows import norms

CHUNK = 1 << 22  # angles held at once


@definition
def rkd_distance(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    *,
    sample_mask: Tensor | None = None,  # [B]
) -> Tensor:
    """Mean over B^2 pairs of huber(h_student - h_teacher), h = distance / mean distance."""
    student, teacher = counting(sample_mask, student, teacher)
    h_s, h_t = (_relative(distances(x, x, "euclidean"))[0] for x in (student, teacher))
    return F.smooth_l1_loss(h_s, h_t, reduction="sum") / max(len(h_s) ** 2, 1)


def _relative(d: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [B, B] over their mean off the diagonal, and that mean; 0 where it is 0."""
    mean = d.sum() / max(len(d) * (len(d) - 1), 1)
    return d / torch.where(mean == 0, 1, mean), mean


@definition
def rkd_angle(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    *,
    sample_mask: Tensor | None = None,  # [B]
) -> Tensor:
    """Mean over B^3 triples of huber(psi_student - psi_teacher), psi_ijk the cosine of the angle at
    x_i between x_j and x_k."""
    student, teacher = counting(sample_mask, student, teacher)

    def cosines(x: Tensor) -> Tensor:  # [B, B, B]
        e = wide(x)[None] - wide(x)[:, None]
        n = norms(e, keepdim=True)
        u = torch.where(n == 0, 0.0, e / torch.where(n == 0, 1.0, n))
        return u @ u.mT

    psi_s, psi_t = cosines(student), cosines(teacher)
    return F.smooth_l1_loss(psi_s, psi_t, reduction="sum") / max(len(psi_s) ** 3, 1)


def rkd_fwd(
    student: Tensor,
    teacher: Tensor,
    relation: str,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    one_sided = {"distance": _distance, "angle": _angle}[relation]
    s, t = wide(student), wide(teacher)
    # huber is even: the teacher's gradient is the student's with the sides exchanged
    loss, ds = one_sided(s, t, need_student)
    dt = one_sided(t, s, True)[1] if need_teacher else t.new_empty(0)
    return loss, ds, dt


def _distance(s: Tensor, t: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative by s or an empty tensor."""
    B = len(s)
    d = distances(s, s, "euclidean")
    h, mean = _relative(d)
    e = h - _relative(distances(t, t, "euclidean"))[0]
    g = e.clamp(-1, 1)
    scale = 1 / max(B * B, 1)
    loss = _huber(e, g).sum(dtype=torch.float64).mul(scale).to(s.dtype)
    if not need:
        return loss, s.new_empty(0)
    # through the mean: all pairs off the diagonal share the derivative by it
    shared = (g * h).sum(dtype=torch.float64) / max(B * (B - 1), 1)
    weight = (g.double() - shared) / torch.where(mean == 0, 1, mean) * scale
    ds, ds_across = gradients_of_pairs(weight, d, s, s, "euclidean")
    return loss, ds + ds_across


def _huber(e: Tensor, g: Tensor) -> Tensor:
    return g * (e - g / 2)


def _angle(s: Tensor, t: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    """Likewise. From squared distances in fp64: 2 <x_j - x_i, x_k - x_i> = q_ij + q_ik - q_jk."""
    B = len(s)
    q_s, q_t = (distances(x, x, "sqeuclidean") for x in (s.double(), t.double()))
    r_s, r_t = (torch.where(q == 0, 0.0, q.rsqrt()) for q in (q_s, q_t))
    step = max(1, CHUNK // max(B * B, 1))
    total = q_s.new_zeros(())
    weight = torch.zeros_like(q_s)  # derivative of the sum by q_s
    for i in range(0, B, step):
        psi_s, psi_t = (
            (q[i : i + step, :, None] + q[i : i + step, None] - q) / 2
            * r[i : i + step, :, None] * r[i : i + step, None]
            for q, r in ((q_s, r_s), (q_t, r_t))
        )  # [step, B, B]  # fmt: skip
        e = psi_s - psi_t
        g = e.clamp(-1, 1)
        total += _huber(e, g).sum()
        if need:
            # an angle between a row and itself is constant
            g.diagonal(dim1=1, dim2=2).zero_()
            r = r_s[i : i + step]
            half = g * r[:, :, None] * r[:, None] / 2
            weight -= half.sum(0)
            weight[i : i + step] += 2 * half.sum(2) - (g * psi_s).sum(2) * r.square()
    scale = 1 / max(B**3, 1)
    loss = (total * scale).to(s.dtype)
    if not need:
        return loss, s.new_empty(0)
    x = s.double()
    ds, ds_across = gradients_of_pairs(weight * scale, q_s, x, x, "sqeuclidean")
    return loss, (ds + ds_across).to(s.dtype)
