# SPDX-License-Identifier: Apache-2.0
"""info_nce: the operator of relational_kl with positive keys in the teacher's place.

One positive key per row, by index or in `own_keys`, is the operator's own case. With labels the
operator gives the log-sum-exp of each row. The mean logit of the row's positives is subtracted: the
product of the row and the mean of these keys, of which there is one per label, O(B D + K D).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form
from kdkernels._key_bank_call import KeyBankCall
from kdkernels._library import autocast_off
from kdkernels._similarity import unit
from kdkernels.ops import _key_bank, _rows
from kdkernels.ops.relational_kl import apply, gradient_choice


def _check(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    *,
    key_labels: Tensor | None,
    own_keys: Tensor | None,
    exclude: Tensor | None,
    temperature: float | Tensor,
    normalize: bool,
    num_keys: int | Tensor | None,
    sample_mask: Tensor | None,
    reduction: str,
) -> tuple[torch.dtype, float | Tensor]:
    """Everything but the numbers inside tensors; returns the common dtype and the temperature."""
    _key_bank.check_bank("keys", keys, "queries", queries)
    _key_bank.check_num_keys(num_keys, keys)
    if positives is not None:
        _checks.labels("positives", positives, "queries", queries)
    if key_labels is not None:
        _checks.labels("key_labels", key_labels, "keys", keys)
        if positives is None:
            raise ValueError("positives must be the queries' labels with key_labels, got None")
    if own_keys is not None:
        _key_bank.check_meeting("own_keys", own_keys, "queries", queries)
        _checks.same_leading("own_keys", own_keys, "queries", queries)
        if positives is not None and key_labels is None:
            raise ValueError(
                "positives must be None with own_keys, which are the positive ones, or labels "
                "beside key_labels"
            )
    elif positives is None:
        raise ValueError("positives must say which keys are positive where own_keys is None")
    if exclude is not None:
        _key_bank.check_exclude(exclude, "queries", queries, keys)
    _checks.sample_mask(sample_mask, "queries", queries)
    by = _key_bank.temperature("temperature", temperature, queries)
    _checks.flag("normalize", normalize)
    _checks.choice("reduction", reduction, _key_bank.REDUCTIONS)
    dtypes = [x.dtype for x in (queries, keys, own_keys) if x is not None]
    return _checks.common_dtype(*dtypes), by


def _operator_args(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    *,
    key_labels: Tensor | None,
    own_keys: Tensor | None,
    exclude: Tensor | None,
    **options: Any,
) -> tuple[Any, ...]:
    dtype, by = _check(
        queries, keys, positives, key_labels=key_labels, own_keys=own_keys, exclude=exclude,
        **options,
    )  # fmt: skip
    num_keys = options["num_keys"]
    bank = _key_bank.form_of_counted(keys, num_keys, dtype)
    excluded = None
    if exclude is not None:
        mask = exclude.dtype == torch.bool
        shape = (len(queries), bank.shape[0]) if mask else exclude.shape
        excluded = form(exclude, dtype=torch.bool if mask else torch.int64, shape=shape)
    call = KeyBankCall(
        form(queries, dtype=dtype),
        None,
        bank,
        own_keys=None if own_keys is None else form(own_keys, dtype=dtype),
        positives=None if key_labels is not None else _key_bank.form_of_index(positives),
        exclude=excluded,
        num_keys=_key_bank.form_of_index(num_keys if isinstance(num_keys, Tensor) else None),
        student_factor=_key_bank.form_of_factor(by, dtype),
        normalize=options["normalize"],
    )
    return *call, _key_bank.number(by), 1.0, _key_bank.scaled_wants_gradient(queries, by)


def _choices(queries: Tensor, temperature: float | Tensor, **_: Any) -> dict[str, str]:
    return gradient_choice(queries, temperature)


@explained_by(_operator_args, _choices, op="relational_kl")
def info_nce(
    queries: Tensor,  # [B, D]
    keys: Tensor,  # [K, D]
    positives: Tensor | None = None,  # [B]
    *,
    key_labels: Tensor | None = None,  # [K]
    own_keys: Tensor | None = None,  # [B, D]
    exclude: Tensor | None = None,  # [B] or [B, K]
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    num_keys: int | Tensor | None = None,
    sample_mask: Tensor | None = None,  # [B]
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Cross-entropy of picking each query's positives out of all keys by similarity.

    With q = softmax(sim(query, keys) / temperature), a row costs -log q[positive], or with several
    positives the mean of -log q over them. The B x K similarities are never in memory: one sweep
    over the keys gives the loss and the gradient of the queries; the gradient of the keys takes one
    more in the backward. What is positive:

    - `positives`: one key per query, by index; `torch.arange(B)` where keys are the batch's.
    - `own_keys`: one key per query that no other query sees, beside a bank of negatives, as MoCo
      has it.
    - `positives` and `key_labels`: every key with the label of the query, as in SupCon; `own_keys`
      are positive too if they are given.

    A sample that is among the keys itself is left out by `exclude`, as in NT-Xent and SupCon:

        info_nce(z, z, torch.arange(2 * N).roll(N), exclude=torch.arange(2 * N))
        info_nce(z, z, labels, key_labels=labels, exclude=torch.arange(len(z)))

    Args:
        queries: [B, D], fp16, bf16, fp32 or fp64. Any strides.
        keys: [K, D], on the same device, K at least 1; the widest dtype is taken where they differ.
        positives: Integer [B]: the key of each query, or with `key_labels` the query's label. None
            where `own_keys` are the only positives.
        key_labels: The label of each key, integer [K].
        own_keys: [B, D], on the same device: one more key for each query, a positive one.
        exclude: The keys that do not count for a query, neither as a positive nor as a negative:
            one by index, integer [B], -1 for none; or any, true in a bool mask [B, K] (false
            negatives, duplicates), which takes B K bytes, and 4 B K more with `key_labels`.
        temperature: A positive number, or a tensor of shape [] or [1], which gets a gradient of
            its shape if it asks for one. A tensor's value is not looked at; one that is not
            positive makes the loss NaN.
        normalize: Divide every query and key by its norm, clamped at 1e-12: similarities are
            cosines. False takes inner products as they are.
        num_keys: How many of the keys count, the first ones, where a queue is not yet full: an
            integer, or an integer tensor without dimensions on the device of the keys, for which
            nothing waits. What lies beyond may be anything, and its gradient is 0.
        sample_mask: Which queries count, with their positives, own_keys and exclude, bool [B]. The
            others may hold anything, cost 0, and their gradient is 0. Nothing waits for a device.
            The keys are those that are given, whatever the mask says. None: all.
        reduction: "mean" and "sum" over the rows that count; "none" gives [B].
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or [B]. 0 for an empty batch. A query that no key has
        the label of costs 0, and counts in the mean.

    Raises:
        TypeError, ValueError: an argument does not fit, by name. Indices and num_keys are looked at
            only where they lie on the CPU; elsewhere num_keys is taken to lie between 0 and K, and
            a positive that names no key, or one that does not count, makes the loss NaN.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        van den Oord, Li and Vinyals, Representation Learning with Contrastive Predictive Coding,
        2018, arXiv:1807.03748; Chen et al., SimCLR, ICML 2020; He et al., MoCo, CVPR 2020; Khosla
        et al., Supervised Contrastive Learning, NeurIPS 2020 (its L_out).
    """
    dtype, by = _check(
        queries, keys, positives, key_labels=key_labels, own_keys=own_keys, exclude=exclude,
        temperature=temperature, normalize=normalize, num_keys=num_keys, sample_mask=sample_mask,
        reduction=reduction,
    )  # fmt: skip
    if sample_mask is not None:
        (queries,) = _rows.zeroed(sample_mask, queries)
        if own_keys is not None:
            (own_keys,) = _rows.zeroed(sample_mask, own_keys)
        if positives is not None:
            positives = positives.masked_fill(~sample_mask, 0)
    counting = _key_bank.counting(num_keys, keys)
    if exclude is not None:
        exclude = _excluded(exclude, sample_mask, keys)
    queries, keys = queries.to(dtype), _key_bank.counted(keys, num_keys, dtype)
    own_keys = None if own_keys is None else own_keys.to(dtype)
    if exclude is not None and exclude.dtype == torch.bool:
        exclude = exclude[:, : keys.shape[0]]
    named = None
    if positives is not None and key_labels is None:
        _key_bank.within("positives", positives, 0, counting)
        named = _counting_positives(positives.long(), exclude)
    call = KeyBankCall(
        queries,
        None,
        keys,
        own_keys=own_keys,
        positives=named,
        exclude=exclude,
        num_keys=num_keys.long() if isinstance(num_keys, Tensor) else None,
        student_factor=_key_bank.factor(by, dtype),
        normalize=normalize,
    )
    temperatures = _key_bank.number(by), 1.0
    if key_labels is None and sample_mask is None:
        return apply(call, *temperatures, reduction, backend)
    losses = apply(call, *temperatures, "none", backend)
    if key_labels is not None:
        losses = _with_labels(losses, call, by, positives, key_labels[: len(keys)])
    return _rows.reduced(losses, sample_mask, reduction)


def _excluded(
    exclude: Tensor,  # [B], or [B, K] bool
    sample_mask: Tensor | None,  # [B]
    keys: Tensor,  # [K, D]
) -> Tensor:
    """Nothing is excluded for a query that does not count."""
    if exclude.dtype == torch.bool:
        return exclude if sample_mask is None else exclude & sample_mask[:, None]
    return _key_bank.excluded(exclude, sample_mask, keys)


def _counting_positives(
    positives: Tensor,  # [B] int64
    exclude: Tensor | None,  # [B], or [B, K] bool
) -> Tensor:  # [B]
    """-1 in place of a positive that is excluded, or an error where no device is waited for."""
    if exclude is None:
        return positives
    if exclude.dtype == torch.bool:
        at = positives.clamp(0, exclude.shape[1] - 1)
        out = exclude.gather(1, at[:, None])[:, 0]
    else:
        out = exclude == positives
    if _key_bank.known(out) and bool(out.any()):
        row = int(out.nonzero()[0, 0])
        raise ValueError(f"exclude must leave each query its positive, got that of query {row}")
    return positives.masked_fill(out, -1)


def _with_labels(
    loss: Tensor,  # [B], of the operator
    call: KeyBankCall,
    by: float | Tensor,
    labels: Tensor,  # [B]
    key_labels: Tensor,  # [K]
) -> Tensor:  # [B]
    """Less the mean logit of the keys that have the label of the row."""
    with autocast_off(call.keys.device.type):
        total, count = _sum_of_positives(call, labels.long(), key_labels.long())
    rows = _key_bank.scaled(call.student, by, call.normalize)
    at = (rows * total).sum(-1)
    if call.own_keys is None:
        return (loss - at / count.clamp_min(1)).where(count > 0, 0.0)
    own_logit = (rows * _key_bank.scaled(call.own_keys, 1.0, call.normalize)).sum(-1)
    return loss + (count * own_logit - at) / (count + 1)


def _sum_of_positives(
    call: KeyBankCall,
    labels: Tensor,  # [B] int64
    key_labels: Tensor,  # [K] int64
) -> tuple[Tensor, Tensor]:  # [B, D], [B]
    """Of the keys that have a row's label, in the accumulation dtype, and how many these are."""
    keys, K = call.keys.to(_checks.accumulation_dtype(call.keys.dtype)), len(key_labels)
    counts = keys.new_ones(K)
    if call.num_keys is not None:  # what lies beyond may be anything
        beyond = torch.arange(K, device=keys.device) >= call.num_keys
        keys, counts = keys.masked_fill(beyond[:, None], 0.0), counts.masked_fill(beyond, 0.0)
    if call.normalize:
        keys = unit(keys)
    if call.exclude is not None and call.exclude.dtype == torch.bool:
        weights = counts * ((labels[:, None] == key_labels) & ~call.exclude)
        return weights @ keys, weights.sum(-1)
    # the sum of each label lies where its first key is in the order of labels
    ordered, _ = key_labels.sort()
    place = torch.searchsorted(ordered, key_labels)
    sums = torch.zeros_like(keys).index_add(0, place, keys)
    counts_of = torch.zeros_like(counts).index_add(0, place, counts)
    at = torch.searchsorted(ordered, labels).clamp_max(K - 1)
    found = (ordered[at] == labels).to(keys.dtype)
    total, count = sums[at] * found[:, None], counts_of[at] * found
    if call.exclude is None:
        return total, count
    k = call.exclude.clamp(0, K - 1)
    out = counts[k] * ((call.exclude == k) & (key_labels[k] == labels))
    return total - out[:, None] * keys[k], count - out
