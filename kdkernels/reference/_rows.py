# SPDX-License-Identifier: Apache-2.0
"""Norms of rows, rows divided by them, and inner products of such rows.

Where a row is 0 all derivatives of its norm are 0; torch's second one is NaN there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._similarity import NORM_EPS, no_infinity


def norms(
    x: Tensor,  # [..., D]
    p: float = 2,
    dim: int = -1,
    keepdim: bool = False,
) -> Tensor:  # [...]
    if p != 2:  # sums of |x|, which have no such place
        return no_infinity(torch.linalg.vector_norm(x, p, dim, keepdim))
    norm = no_infinity(_Norm.apply(x, dim))
    return norm if keepdim else norm.squeeze(dim)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,  # [..., D]
        dim: int,
    ) -> Tensor:  # [..., 1]
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor,  # [..., 1]
    ) -> tuple[Tensor, None]:
        x, norm = ctx.saved_tensors
        zero = norm == 0
        if torch.is_grad_enabled():  # a gradient that may be differentiated
            norm = torch.linalg.vector_norm(torch.where(zero, 1.0, x), dim=ctx.dim, keepdim=True)
        return x * (dout / norm).masked_fill(zero, 0.0), None


def unit(
    x: Tensor,  # [..., D]
    p: float = 2,
) -> Tensor:  # [..., D]
    """`F.normalize`, but NaN for a row whose norm overflows."""
    return x / norms(x, p, keepdim=True).clamp_min(NORM_EPS)


def similarities(
    x: Tensor,  # [..., B, D]
    keys: Tensor,  # [..., K, D]
    normalize: bool,
) -> Tensor:  # [..., B, K]
    """Inner products, or cosines."""
    return unit(x) @ unit(keys).mT if normalize else x @ keys.mT


def normalize_backward(
    x: Tensor,  # [..., D]
    du: Tensor,  # [..., D], the gradient of u = x / max(|x|, NORM_EPS)
) -> Tensor:
    """The gradient of x, in fp64: its radial part, which is taken away, can be much larger than
    what remains."""
    x, du = x.double(), du.double()
    norm = norms(x, keepdim=True)
    u = x / norm.clamp_min(NORM_EPS)
    return (du - u * (u * du).sum(-1, keepdim=True) * (norm >= NORM_EPS)) / norm.clamp_min(NORM_EPS)
