# SPDX-License-Identifier: Apache-2.0
"""Mean squared error between normalised Gram matrices, in plain PyTorch.

`gram_mse` is the definition. `gram_mse_fwd` and `gram_mse_bwd` are the operator pair in closed
form, as derived in docs/ops/gram_mse.md, whose names (r, q, x, a, b, c, C, K, M) they keep.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels._similarity import NORM_EPS
from kdkernels.reference._definition import definition
from kdkernels.reference._rows import normalize_backward, unit


@definition
def gram_mse(
    student: Tensor,  # [..., B, D_s]
    teacher: Tensor,  # [..., B, D_t]
    *,
    normalize: Literal["row_l2", "row_l1", "feature", "none"] = "row_l2",
    kernel: Literal["linear", "rbf_taylor"] = "linear",
    gamma: float = 0.4,
    order: int = 2,
    sample_mask: Tensor | None = None,  # [..., B]
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:  # [] or [...]
    """Mean over i, j of (G_student - G_teacher)_ij^2 per group, differentiable by autograd."""
    options: dict[str, Any] = {
        "normalize": normalize, "kernel": kernel, "gamma": gamma, "order": order,
        "sample_mask": sample_mask,
    }  # fmt: skip
    sums = (gram(student, **options) - gram(teacher, **options)).square().sum((-2, -1))
    if reduction == "sum":
        return sums.sum()
    rows = torch.full_like(sums, student.shape[-2])
    if sample_mask is not None:
        rows = sample_mask.sum(-1)
    per_group = sums / (rows * rows).clamp_min(1)
    if reduction == "none":
        return per_group
    groups = per_group.numel() if sample_mask is None else int((rows > 0).sum())
    return per_group.sum() / max(groups, 1)


def gram(
    x: Tensor,  # [..., B, D]
    *,
    normalize: str = "row_l2",
    kernel: str = "linear",
    gamma: float = 0.4,
    order: int = 2,
    sample_mask: Tensor | None = None,  # [..., B]
) -> Tensor:  # [..., B, B]
    """G of one side, 0 in rows and columns that do not count."""
    if sample_mask is not None:
        x = x.where(sample_mask[..., None], 0.0)
    if normalize == "feature":
        x = unit(x)
    g = x @ x.mT
    if kernel == "rbf_taylor":
        g = sum(c * g**p for p, c in enumerate(taylor_coefficients(gamma, order)))
    if sample_mask is not None:
        g = g.where(sample_mask[..., None] & sample_mask[..., None, :], 0.0)
    if normalize in ("row_l2", "row_l1"):
        g = unit(g, int(normalize[-1]))
    return g


def taylor_coefficients(gamma: float, order: int) -> list[float]:
    """Coefficients of s^p in exp(-2 gamma) sum_p (2 gamma s)^p / p!, the expansion of exp(-gamma
    |u - v|^2) at s = <u, v>.
    """
    return [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]


def gram_mse_fwd(
    student: Tensor,  # [G, B, D_s]
    teacher: Tensor,  # [G, B, D_t]
    normalize: str,
    kernel: str,
    gamma: float,
    order: int,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    s, t = (_prepare(x, normalize, algorithm) for x in (student, teacher))
    acc = torch.promote_types(student.dtype, torch.float32)
    if algorithm == "factored":
        loss, *residuals = _factored_fwd(s, t, normalize)
        return loss.to(acc), *residuals
    gram_s, gram_t = s @ s.mT, t @ t.mT
    if kernel == "rbf_taylor":
        coefficients = taylor_coefficients(gamma, order)
        loss = (
            (_polynomial(gram_s, coefficients) - _polynomial(gram_t, coefficients))
            .square()
            .sum((1, 2))
        )
        coef = _uniform_coef(s)
    elif normalize in ("row_l2", "row_l1"):
        wide_s, wide_t = gram_s.double(), gram_t.double()
        terms = (wide_s * wide_s, wide_t * wide_t, wide_s * wide_t, wide_s.abs(), wide_t.abs())
        loss, coef = _row_normalised(*(term.sum(-1) for term in terms), normalize)
    else:
        loss, coef = (gram_s - gram_t).square().sum((1, 2)), _uniform_coef(s)
    if algorithm == "streamed":  # two tensors, since an operator's results may not alias
        gram_s, gram_t = s.new_empty(len(s), 0, 0), s.new_empty(len(s), 0, 0)
    return loss.to(acc), coef, gram_s, gram_t, s.new_empty(len(s), 0, 0)


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
) -> tuple[Tensor, Tensor]:
    s, t = (_prepare(x, normalize, algorithm) for x in (student, teacher))
    a, b_s, b_t, c_s, c_t = coef.unsqueeze(-1).unbind(1)  # each [G, B, 1], fp64
    if algorithm == "streamed":
        gram_student, gram_teacher = s @ s.mT, t @ t.mT

    def tiled(x: Tensor, side: Tensor, other: Tensor, b: Tensor, c: Tensor) -> Tensor:
        if kernel == "rbf_taylor":
            coefficients = taylor_coefficients(gamma, order)
            slope = [p * coefficient for p, coefficient in enumerate(coefficients)][1:]
            error = _polynomial(side, coefficients) - _polynomial(other, coefficients)
            return 4 * error * _polynomial(side, slope) @ x
        half = b * side + a * other + c * side.sign()
        return (half + half.mT).to(x.dtype) @ x

    def factored(x: Tensor, y: Tensor, side: Tensor, cross_yx: Tensor, b: Tensor) -> Tensor:
        p, q = a.to(x.dtype), b.to(x.dtype)
        return q * (x @ side) + x @ (x.mT @ (q * x)) + p * (y @ cross_yx) + y @ (y.mT @ (p * x))

    def gradient(source: Tensor, x: Tensor, *terms: Tensor) -> Tensor:
        dx = (factored if algorithm == "factored" else tiled)(x, *terms) * dout[:, None, None]
        if normalize == "feature":
            dx = normalize_backward(source, dx)
        return dx.to(source.dtype)

    nothing = student.new_empty(0)
    if algorithm == "factored":
        of_student = (t, gram_student, cross, b_s)
        of_teacher = (s, gram_teacher, cross.mT, b_t)
    else:
        of_student = (gram_student, gram_teacher, b_s, c_s)
        of_teacher = (gram_teacher, gram_student, b_t, c_t)
    return (
        gradient(student, s, *of_student) if need_student else nothing,
        gradient(teacher, t, *of_teacher) if need_teacher else nothing,
    )


def _prepare(x: Tensor, normalize: str, algorithm: str) -> Tensor:
    """Features in the dtype that products are made in, normalised if the Gram is that of unit
    vectors.

    Factors of fp32 features are fp64: docs/numerics.md has the reason.
    """
    wide = algorithm == "factored" and x.dtype == torch.float32
    x = x.to(torch.promote_types(x.dtype, torch.float64 if wide else torch.float32))
    return unit(x) if normalize == "feature" else x


def _polynomial(g: Tensor, coefficients: list[float]) -> Tensor:
    """Horner's rule, highest power first."""
    value = torch.full_like(g, coefficients[-1]) if coefficients else torch.zeros_like(g)
    for coefficient in reversed(coefficients[:-1]):
        value = value * g + coefficient
    return value


def _uniform_coef(s: Tensor) -> Tensor:
    """a = -2, b = 2, c = 0: the derivative of sum (A_S - A_T)^2 with no normalisation of rows."""
    values = s.new_tensor([-2.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    return values[None, :, None].expand(len(s), 5, s.shape[1]).contiguous()


def _row_normalised(
    r2: Tensor, q2: Tensor, x: Tensor, l1_s: Tensor, l1_t: Tensor, normalize: str
) -> tuple[Tensor, Tensor]:
    """Loss and coefficients from the row sums of A_S^2, A_T^2, A_S A_T, |A_S| and |A_T|, each [G,
    B] in fp64.
    """
    l2 = normalize == "row_l2"
    norm_s, norm_t = (r2.sqrt(), q2.sqrt()) if l2 else (l1_s, l1_t)
    r, q = norm_s.clamp_min(NORM_EPS), norm_t.clamp_min(NORM_EPS)
    self_s, self_t, cross = r2 / r**2, q2 / q**2, x / (r * q)
    # <dG_i, G_i> / 2, which the normalisation takes back from the gradient; nothing where the clamp
    # holds the norm
    back_s = torch.where(norm_s >= NORM_EPS, self_s - cross, 0.0)
    back_t = torch.where(norm_t >= NORM_EPS, self_t - cross, 0.0)
    a = -2 / (r * q)
    if l2:
        zero = torch.zeros_like(a)
        rows = (a, 2 * (1 - back_s) / r**2, 2 * (1 - back_t) / q**2, zero, zero)
    else:
        rows = (a, 2 / r**2, 2 / q**2, -2 * back_s / r, -2 * back_t / q)
    return (self_s + self_t - 2 * cross).clamp_min(0).sum(-1), torch.stack(rows, 1)


def _factored_fwd(
    s: Tensor, t: Tensor, normalize: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gram_s, gram_t, cross = s.mT @ s, t.mT @ t, t.mT @ s  # C, K, M
    if normalize == "row_l2":
        r2, q2, x = (
            ((y @ f).double() * z).sum(-1)
            for y, f, z in ((s, gram_s, s), (t, gram_t, t), (t, cross, s))
        )
        loss, coef = _row_normalised(r2, q2, x, r2, q2, normalize)
    else:
        norm2 = [f.square().sum((1, 2), dtype=torch.float64) for f in (gram_s, gram_t, cross)]
        loss, coef = (norm2[0] + norm2[1] - 2 * norm2[2]).clamp_min(0), _uniform_coef(s)
    return loss, coef, gram_s, gram_t, cross
