# SPDX-License-Identifier: Apache-2.0
"""Inner products of rows with rows of a bank that each of them names, in plain PyTorch.

`sampled_similarity` is the definition. `sampled_similarity_fwd` and `sampled_similarity_bwd` are
the operators, as derived in docs/ops/sampled_similarity.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._checks import accumulation_dtype
from kdkernels.reference._definition import definition


@definition
def sampled_similarity(
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, K]
) -> Tensor:  # [B, K]
    """<x_i, bank[indices_ik]>, differentiable by autograd."""
    return (bank[indices.long()].to(x.dtype) @ x[:, :, None]).squeeze(-1)


def sampled_similarity_fwd(
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, K]
) -> Tensor:  # [B, K]
    acc = accumulation_dtype(x.dtype)
    scores = x.new_empty(indices.shape, dtype=acc)
    # into a tensor of its own, since an operator returns no view
    torch.bmm(_rows(bank, indices).to(acc), x.to(acc)[:, :, None], out=scores[:, :, None])
    return scores


def sampled_similarity_bwd(
    dscores: Tensor,  # [B, K]
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, K]
) -> Tensor:  # [B, D]
    dx = dscores[:, None, :] @ _rows(bank, indices).to(dscores.dtype)
    return dx.squeeze(1).to(x.dtype).contiguous()


def _rows(bank: Tensor, indices: Tensor) -> Tensor:  # [B, K, D]
    """An index that names no row gives NaN."""
    inside = (indices >= 0) & (indices < len(bank))
    return bank[indices.clamp(0, len(bank) - 1)].where(inside[:, :, None], torch.nan)
