# SPDX-License-Identifier: Apache-2.0
"""sampled_similarity: inner products of rows with rows of a bank that each of them names.

The B x K x D rows that are named are never in memory. Traffic of one forward and backward, in
elements: 2 B K D reads of the bank where rows are gathered, or 2 N D and a few passes over B x N
where all products are cheaper, and 4 B K of scores and indices. Derivation:
docs/ops/sampled_similarity.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form, requested_backend
from kdkernels._function import KernelFunction, keep_for_backward
from kdkernels._library import define_operator, first_order
from kdkernels.ops import _key_bank

# The operators know x [B, D], bank [N, D] of the dtype of x or a narrower one, and indices [B, K]
# int64:
#   scores [B, K]  <x_i, bank[indices_ik]>, fp32, fp64 for fp64
#   dx     [B, D]  sum over k of dscores_ik bank[indices_ik], in the dtype of x
# An index that names no row makes its score, and the row's gradient, NaN.


def _fwd_fake(x: Tensor, bank: Tensor, indices: Tensor, backend: str) -> Tensor:
    return x.new_empty(indices.shape, dtype=_checks.accumulation_dtype(x.dtype))


def _bwd_fake(dscores: Tensor, x: Tensor, bank: Tensor, indices: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


sampled_similarity_fwd = define_operator(
    "sampled_similarity",
    "fwd",
    "(Tensor x, Tensor bank, Tensor indices, str backend) -> Tensor scores",
    _fwd_fake,
)
sampled_similarity_bwd = define_operator(
    "sampled_similarity",
    "bwd",
    "(Tensor dscores, Tensor x, Tensor bank, Tensor indices, str backend) -> Tensor dx",
    _bwd_fake,
)


class SampledSimilarityFunction(KernelFunction):
    """Attaches the operator pair to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bank: Tensor, indices: Tensor, backend: str) -> Tensor:
        keep_for_backward(ctx, x, bank, indices)
        ctx.backend = backend
        return sampled_similarity_fwd(x, bank, indices, backend)

    @staticmethod
    @first_order
    def backward(ctx: Any, kept: tuple[Tensor, ...], dscores: Tensor) -> tuple[Any, ...]:
        return sampled_similarity_bwd(dscores, *kept, ctx.backend), None, None, None


def _check(x: Tensor, bank: Tensor, indices: Tensor) -> torch.dtype:
    """Everything but the numbers inside tensors; returns the wider dtype of x and bank."""
    _key_bank.check_bank("bank", bank, "x", x)
    _checks.integer("indices", indices)
    _checks.same_device("indices", indices, "x", x)
    if indices.dim() != 2 or indices.shape[0] != x.shape[0]:
        raise ValueError(
            f"indices must have shape [{x.shape[0]}, K], a row per row of x, "
            f"got {list(indices.shape)}"
        )
    if _checks.wants_gradient(bank):
        raise ValueError(
            "bank must not require a gradient, which is implemented for x only: detach it, or index"
            " it in torch"
        )
    return _checks.common_dtype(x.dtype, bank.dtype)


def prepared(x: Tensor, bank: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of the forward operator. The bank keeps its dtype: its rows are widened as they are
    read."""
    dtype = _check(x, bank, indices)
    _key_bank.within("indices", indices, 0, bank.shape[0])
    return x.to(dtype), bank, indices.long()


def _operator_args(x: Tensor, bank: Tensor, indices: Tensor) -> tuple[Any, ...]:
    dtype = _check(x, bank, indices)
    return form(x, dtype=dtype), form(bank), form(indices, dtype=torch.int64)


def _choices(**_: Any) -> dict[str, str]:
    return {}


@explained_by(_operator_args, _choices)
def sampled_similarity(
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, K]
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Inner products of each row with the rows of a bank that it names.

    Score (i, k) is <x_i, bank[indices_ik]>. The B x K x D rows that are named are never in memory,
    neither here nor in the backward, which gathers them again. So the bank must stay as it is in
    between; autograd notices where it does not. Nothing is normalised.

    Args:
        x: [B, D], fp16, bf16, fp32 or fp64. Any strides.
        bank: [N, D] with N of at least 1, on the same device; products are in the wider dtype where
            they differ. Only rows that are named are read and widened, whatever the dtype. A
            constant: one that asks for a gradient is refused.
        indices: Rows of the bank, integer [B, K], in any order and as often as they like.
        backend: See `kdkernels.explain`.

    Returns:
        [B, K], fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument does not fit, by name. Indices are looked at only where
            they lie on the CPU; elsewhere one that names no row makes its score NaN.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020,
        arXiv:1910.10699, whose memories are such banks.
    """
    return SampledSimilarityFunction.apply(*prepared(x, bank, indices), requested_backend(backend))
