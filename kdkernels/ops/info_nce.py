# SPDX-License-Identifier: Apache-2.0
"""info_nce: the operator of relational_kl with one positive key per row in the teacher's place."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by
from kdkernels.ops import _key_bank
from kdkernels.ops.relational_kl import apply, gradient_choice, with_dloss


def _prepare(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    num_keys: int | Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Any, ...]:
    """Arguments of the forward operator, without with_dloss."""
    _key_bank.bank("keys", keys, "queries", queries)
    limit = _key_bank.limit(num_keys, keys)
    _key_bank.indices("positives", positives, "queries", queries, limit)
    by = _key_bank.temperature("temperature", temperature, queries)
    _checks.flag("normalize", normalize)
    _checks.choice("reduction", reduction, _key_bank.REDUCTIONS)
    queries, keys = _key_bank.one_dtype({"queries": queries, "keys": keys})
    num_keys, keys = _key_bank.cut(num_keys, keys)
    x = _key_bank.divided(queries, by, normalize)
    scale = _key_bank.scale_of(keys, normalize)
    positives = positives.long()
    return x, None, keys, None, scale, None, positives, None, num_keys, False, None, None


def _operator_args(*args: Any, **options: Any) -> tuple[Any, ...]:
    prepared = _prepare(*args, **options)
    return *prepared, with_dloss(prepared[0])


def _choices(*args: Any, **options: Any) -> dict[str, str]:
    return gradient_choice(_prepare(*args, **options)[0])


@explained_by(_operator_args, _choices, op="relational_kl")
def info_nce(
    queries: Tensor,  # [B, D]
    keys: Tensor,  # [K, D]
    positives: Tensor,  # [B]
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    num_keys: int | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Cross-entropy of picking each query's positive out of all keys by similarity.

    With q = softmax(sim(query, keys) / temperature), a row costs -log q[positive]. The B x K
    similarities are never in memory: one sweep over the keys gives the loss and the gradient of the
    queries; the gradient of the keys takes one more in the backward.

    Args:
        queries: [B, D], fp16, bf16, fp32 or fp64. Any strides.
        keys: [K, D], same dtype and device (under autocast the wider dtype is taken), K at least 1.
        positives: The key of each query, integer [B]; `torch.arange(B)` where keys are the batch's.
        temperature: A positive number, or a tensor of shape [] or [1], which gets a gradient of
            its shape if it asks for one. A tensor's value is not looked at; one that is not
            positive makes the loss NaN.
        normalize: Divide every query and key by its norm, clamped at 1e-12: similarities are
            cosines. False takes inner products as they are.
        num_keys: How many of the keys count, the first ones, where a queue is not yet full: an
            integer, or an integer tensor without dimensions on the device of the keys, for which
            nothing waits. What lies beyond may be anything, and its gradient is 0.
        reduction: "mean" and "sum" over rows; "none" gives [B].
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or [B]. 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument does not fit, by name. Positives and num_keys are looked
            at only where they lie on the CPU; elsewhere num_keys is taken to lie between 0 and K,
            and a positive that names no key, or one that does not count, makes the loss NaN.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        van den Oord, Li and Vinyals, Representation Learning with Contrastive Predictive Coding,
        2018, arXiv:1807.03748.
    """
    prepared = _prepare(
        queries, keys, positives, temperature=temperature, normalize=normalize, num_keys=num_keys,
        reduction=reduction,
    )  # fmt: skip
    return apply(prepared, reduction, backend)
