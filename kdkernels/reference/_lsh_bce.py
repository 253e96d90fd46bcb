# SPDX-License-Identifier: Apache-2.0
"""Binary cross-entropy of random projections against hash bits, in plain PyTorch.

`lsh_encode` and `lsh_bce` are the definitions. `lsh_bce_encode`, `lsh_bce_fwd` and `lsh_bce_bwd`
are the operators in closed form, as derived in docs/ops/lsh_bce.md.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.reference._definition import definition

BLOCK = 4096  # bits that `lsh_bce_encode` projects at a time; a multiple of 8


@definition
def lsh_encode(
    features: Tensor,  # [B, D]
    weight: Tensor,  # [N, D]
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [B, ceil(N / 8)] uint8
    """Bit n of a row is 1 where <features, weight_n> + bias_n > 0; bit n % 8 of byte n // 8."""
    return pack(F.linear(features, weight, bias) > 0)


@definition
def lsh_bce(
    student: Tensor,  # [B, D]
    codes: Tensor,  # [B, ceil(N / 8)] uint8
    weight: Tensor,  # [N, D]
    bias: Tensor | None = None,  # [N]
    *,
    sample_mask: Tensor | None = None,  # [B]
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:  # [] or [B]
    """The cross-entropy of the bits, differentiable by autograd."""
    losses = _sums_over_bits(student, codes, weight, bias)
    if sample_mask is not None:
        losses = losses.where(sample_mask, 0.0)
    if reduction == "sum":
        return losses.sum()
    losses = losses / max(weight.shape[0], 1)
    if reduction == "none":
        return losses
    count = len(student) if sample_mask is None else int(sample_mask.sum())
    return losses.sum() / max(count, 1)


def _sums_over_bits(
    student: Tensor,  # [B, D]
    codes: Tensor,  # [B, ceil(N / 8)] uint8
    weight: Tensor,  # [N, D]
    bias: Tensor | None,  # [N]
) -> Tensor:  # [B]
    z = F.linear(student, weight, bias)
    y = unpack(codes, len(weight)).to(z.dtype)
    return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1)


def pack(
    bits: Tensor,  # [B, N] bool
) -> Tensor:  # [B, ceil(N / 8)] uint8
    bytes_ = F.pad(bits, (0, -bits.shape[1] % 8)).to(torch.uint8).unflatten(1, (-1, 8))
    return (bytes_ << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(
        -1, dtype=torch.uint8
    )


def unpack(
    codes: Tensor,  # [B, ceil(N / 8)] uint8
    N: int,
) -> Tensor:  # [B, N] bool
    """What lies beyond N in the last byte is ignored."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (codes.unsqueeze(-1) >> shifts & 1).flatten(1)[:, :N].bool()


def lsh_bce_encode(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, w, b = (_wide(t) for t in (features, weight, bias))
    blocks = [
        lsh_encode(x, w[n : n + BLOCK], None if b is None else b[n : n + BLOCK])
        for n in range(0, len(w), BLOCK)
    ]
    return torch.cat(blocks, 1) if blocks else x.new_empty((len(x), 0), dtype=torch.uint8)


def lsh_bce_fwd(
    student: Tensor,  # [B, D]
    codes: Tensor,  # [B, ceil(N / 8)]
    weight: Tensor,  # [N, D]
    bias: Tensor | None,  # [N]
    sample_mask: Tensor | None,  # [B]
    need_student: bool,
) -> tuple[Tensor, Tensor]:
    s, w, b = _selected(student, sample_mask), _wide(weight), _wide(bias)
    loss = _sums_over_bits(s, codes, w, b)
    dloss = s.new_empty(0)
    if need_student:
        dloss = _dz(s, codes, w, b) @ w
    if sample_mask is not None:
        loss = loss.where(sample_mask, 0.0)
        dloss = dloss.where(sample_mask[:, None], 0.0) if need_student else dloss
    return loss, dloss


def lsh_bce_bwd(
    dout: Tensor,  # [B]
    student: Tensor,  # [B, D]
    codes: Tensor,  # [B, ceil(N / 8)]
    weight: Tensor,  # [N, D]
    bias: Tensor | None,  # [N]
    sample_mask: Tensor | None,  # [B]
    dloss: Tensor,  # [B, D] or empty
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw = student.new_empty(0), weight.new_empty(0)
    db = weight.new_empty(0)
    if need_student:
        dx = (dout[:, None] * dloss).to(student.dtype).contiguous()
    if need_weight or need_bias:
        s, w, b = _selected(student, sample_mask), _wide(weight), _wide(bias)
        dz = dout[:, None] * _dz(s, codes, w, b)
        if sample_mask is not None:
            dz = dz.where(sample_mask[:, None], 0.0)
        dw = (dz.mT @ s).to(weight.dtype) if need_weight else dw
        db = dz.sum(0).to(weight.dtype) if need_bias else db
    return dx, dw, db


def _wide(x: Tensor | None) -> Tensor | None:
    """In the accumulation dtype."""
    if x is None:
        return None
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _selected(student: Tensor, sample_mask: Tensor | None) -> Tensor:
    """Rows that do not count are not read: they may hold anything."""
    s = _wide(student)
    return s if sample_mask is None else s.where(sample_mask[:, None], 0.0)


def _dz(s: Tensor, codes: Tensor, w: Tensor, b: Tensor | None) -> Tensor:  # [B, N]
    """Derivative of the cross-entropy by the projection, sigmoid(z) - y, without its cancellation
    where y = 1: the sigmoid of z, or minus that of -z.
    """
    sign = 1.0 - 2.0 * unpack(codes, len(w)).to(s.dtype)
    return sign * torch.sigmoid(sign * F.linear(s, w, b))
