# SPDX-License-Identifier: Apache-2.0
"""Distances between the rows of two matrices, and how their derivatives reach the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.reference._rows import norms


def distances(
    x: Tensor,  # [..., B, D]
    r: Tensor,  # [..., M, D]
    distance: str,
) -> Tensor:  # [..., B, M]
    """Distances from exact differences, differentiable; "cosine" takes unit vectors.

    NaN to and from a row that is not finite.
    """
    # in half precision torch has no cdist on the CPU
    x, r = (t.float() if t.itemsize < 4 else t for t in (x, r))
    d = _Euclidean.apply(x, r)
    if distance != "euclidean":
        d = d * d / (1 if distance == "sqeuclidean" else 2)
    return torch.where(finite_pairs(x, r), d, torch.nan)


class _Euclidean(torch.autograd.Function):
    """`torch.cdist`, which torch differentiates once only, any number of times."""

    @staticmethod
    def forward(
        x: Tensor,  # [..., B, D]
        r: Tensor,  # [..., M, D]
    ) -> Tensor:  # [..., B, M]
        return torch.cdist(x, r, compute_mode="donot_use_mm_for_euclid_dist")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor,  # [..., B, M]
    ) -> tuple[Tensor, Tensor]:
        x, r, d = ctx.saved_tensors
        if not torch.is_grad_enabled():  # nobody differentiates the gradient
            return (
                torch.ops.aten._cdist_backward(dout.contiguous(), x, r, 2.0, d),
                torch.ops.aten._cdist_backward(dout.mT.contiguous(), r, x, 2.0, d.mT.contiguous()),
            )
        difference = x[..., :, None, :] - r[..., None, :, :]
        d = norms(difference)
        weight = torch.where(d == 0, 0.0, dout / torch.where(d == 0, 1.0, d))
        pulls = weight[..., None] * difference
        return pulls.sum(-2), -pulls.sum(-3)


def finite_pairs(
    x: Tensor,  # [..., B, D]
    r: Tensor,  # [..., M, D]
) -> Tensor:  # [..., B, M]
    """Whether both rows are finite: a squared norm below a quarter of the largest number, since
    other distances may overflow."""
    finite_x, finite_r = (
        wide(t.detach()).square().sum(-1) < torch.finfo(wide(t).dtype).max / 4 for t in (x, r)
    )
    return finite_x[..., :, None] & finite_r[..., None, :]


def left_out(
    exclude: Tensor | None,  # [B]
    d: Tensor,  # [B, M]
) -> Tensor:  # [B, M] bool
    """The pair of each row with the reference that it leaves out, if `exclude` names one."""
    if exclude is None:
        return torch.zeros_like(d, dtype=torch.bool)
    return exclude[:, None] == torch.arange(d.shape[1], device=d.device)


def gradients_of_pairs(
    weight: Tensor,  # [..., B, M], derivative of a sum by each distance
    d: Tensor,  # [..., B, M]
    x: Tensor,  # [..., B, D]
    r: Tensor,  # [..., M, D]
    distance: str,
) -> tuple[Tensor, Tensor]:
    """Derivatives of that sum by x and by r; 0 between coincident points.

    In fp64 and around the mean, since each is a difference of larger numbers.
    """
    if distance == "euclidean":
        weight = torch.where((d == 0) | (weight == 0), 0.0, weight / d)
    elif distance == "sqeuclidean":
        weight = 2 * weight
    weight, centre = weight.double(), r.double().sum(-2, keepdim=True) / max(r.shape[-2], 1)
    wide_x, wide_r = x.double() - centre, r.double() - centre
    dx = weight.sum(-1, keepdim=True) * wide_x - weight @ wide_r
    dr = weight.sum(-2)[..., None] * wide_r - weight.mT @ wide_x
    return dx.to(x.dtype).contiguous(), dr.to(r.dtype).contiguous()


def wide(x: Tensor) -> Tensor:
    """In the accumulation dtype."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
