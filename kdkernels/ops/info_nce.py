# SPDX-License-Identifier: Apache-2.0
"""info_nce: the operator of relational_kl with one positive key per row in the teacher's place."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form
from kdkernels._key_bank_call import KeyBankCall
from kdkernels.ops import _key_bank
from kdkernels.ops.relational_kl import apply, gradient_choice


def _check(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    num_keys: int | Tensor | None,
    reduction: str,
) -> tuple[torch.dtype, float | Tensor]:
    """Everything but the numbers inside tensors; returns the common dtype and the temperature."""
    _key_bank.check_bank("keys", keys, "queries", queries)
    _key_bank.check_num_keys(num_keys, keys)
    _checks.labels("positives", positives, "queries", queries)
    by = _key_bank.temperature("temperature", temperature, queries)
    _checks.flag("normalize", normalize)
    _checks.choice("reduction", reduction, _key_bank.REDUCTIONS)
    return _checks.common_dtype("keys", keys, "queries", queries.dtype), by


def _operator_args(
    queries: Tensor, keys: Tensor, positives: Tensor, **options: Any
) -> tuple[Any, ...]:
    dtype, by = _check(queries, keys, positives, **options)
    num_keys = options["num_keys"]
    bank = _key_bank.form_of_counted(keys, num_keys, dtype)
    call = KeyBankCall(
        form(queries, dtype=_checks.accumulation_dtype(dtype)),
        None,
        bank,
        key_scale=_key_bank.form_of_scale(bank, options["normalize"]),
        positives=_key_bank.form_of_index(positives),
        num_keys=_key_bank.form_of_index(num_keys if isinstance(num_keys, Tensor) else None),
    )
    return *call, None, None, _key_bank.divided_wants_gradient(queries, by)


def _choices(queries: Tensor, temperature: float | Tensor, **_: Any) -> dict[str, str]:
    return gradient_choice(queries, temperature)


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
        temperature: A positive number, or a tensor without dimensions, which gets a gradient if it
            asks for one. A tensor's value is not looked at; one that is not positive makes the loss
            NaN.
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
    dtype, by = _check(queries, keys, positives, temperature, normalize, num_keys, reduction)
    _key_bank.within("positives", positives, 0, _key_bank.counting(num_keys, keys))
    keys = _key_bank.counted(keys, num_keys, dtype)
    call = KeyBankCall(
        _key_bank.divided(queries.to(dtype), by, normalize),
        None,
        keys,
        key_scale=_key_bank.scale_of(keys, normalize),
        positives=positives.long(),
        num_keys=num_keys.long() if isinstance(num_keys, Tensor) else None,
    )
    return apply(call, None, None, reduction, backend)
