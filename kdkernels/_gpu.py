# SPDX-License-Identifier: Apache-2.0
"""What the launchers of both GPU backends, Triton and CUDA, share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


def refuse_fp64(first: Tensor) -> str | None:
    """Why an operator cannot take the dtype of its first tensor; None if it can.

    The first tensor of a forward holds features; that of a backward, the gradient of the results,
    is in fp64 exactly where the features are.
    """
    if first.dtype == torch.float64:
        return "its products accumulate in fp32, which is not enough for fp64 features"
    return None


# The least compute capability of an NVIDIA GPU that the kernels are written for.
OLDEST_CAPABILITY = (8, 0)


def refuse_capability(major: int, minor: int) -> str | None:
    """Why kernels do not run on an NVIDIA GPU; None if they do."""
    if (major, minor) >= OLDEST_CAPABILITY:
        return None
    return (
        "its kernels need tensor cores for bf16 and tf32, which GPUs have from compute capability "
        f"{'.'.join(map(str, OLDEST_CAPABILITY))} on, and this one has {major}.{minor}"
    )


@cache
def refuse_device(device: torch.device) -> str | None:
    """Why kernels do not run on a CUDA device; None if they do."""
    if torch.version.hip:
        return None
    properties = torch.cuda.get_device_properties(device)
    return refuse_capability(properties.major, properties.minor)


def fp32_matmul() -> str:
    """How fp32 features are multiplied: "highest", or "high" where torch would take tf32.

    torch's own products on a GPU follow `torch.backends.cuda.matmul.fp32_precision`, which inherits
    from `torch.backends.cudnn.fp32_precision` and `torch.backends.fp32_precision`. The older
    setters write it too; the older getter raises where only a newer one was used.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:  # a torch that has the older getter alone
        return torch.get_float32_matmul_precision()
    return "high" if setting == "tf32" else "highest"


def sorted_exclude(
    exclude: Tensor,  # [B] int64
    order: Tensor,  # [B] int64
    reference_order: Tensor,  # [M] int64
) -> Tensor:  # [B] int64
    """The reference that each anchor leaves out, both in the order of their labels; -1 for none."""
    exclude, M = exclude[order], len(reference_order)
    named = (exclude >= 0) & (exclude < M)
    places = torch.arange(M, device=exclude.device)
    place = torch.empty_like(reference_order).index_copy_(0, reference_order, places)
    return torch.where(named, place[exclude * named], -1)


class Contributions(NamedTuple):
    """The rows that anchors chose, which each contribute to the gradient of the anchor, and in the
    order of the chosen rows, to whose gradient each anchor contributes."""

    chosen: Tensor  # [2 B] int64: positives, then negatives; -1 where there is none
    d: Tensor  # [2 B] distances
    dd: Tensor  # [2 B] their gradients
    # [2 B] int64: entries of the tensors above, sorted by the chosen row, then by the anchor
    order: Tensor
    # [M + 1] int64: the first entry of each chosen row in `order`. Where a caller wants neither
    # `order` nor `begin`, both are `chosen`.
    begin: Tensor


def triplet_gradients(
    gradient: Callable[[Contributions, bool, bool], Tensor],
    dd_ap: Tensor,  # [B]
    dd_an: Tensor,  # [B]
    embeddings: Tensor,  # [B, D]
    references: Tensor,  # [M, D]
    positive: Tensor,  # [B] int64
    negative: Tensor,  # [B] int64
    d_ap: Tensor,  # [B]
    d_an: Tensor,  # [B]
    in_batch: bool,
    need_embeddings: bool,
    need_references: bool,
) -> tuple[Tensor, Tensor]:
    """What the operator `triplet_bwd` returns, from its arguments.

    `gradient(contributions, anchor, chosen)` returns the gradient of rows that are anchors, or were
    chosen, or both. It may follow `order` only where the rows were chosen.
    """
    need_references = need_references and not in_batch
    by_row = in_batch or need_references
    triplets = _contributions(positive, negative, d_ap, d_an, dd_ap, dd_an, len(references), by_row)
    return (
        gradient(triplets, True, in_batch) if need_embeddings else embeddings.new_empty(0),
        gradient(triplets, False, True) if need_references else references.new_empty(0),
    )


def _contributions(
    positive: Tensor, negative: Tensor, d_ap: Tensor, d_an: Tensor, dd_ap: Tensor, dd_an: Tensor,
    M: int, by_row: bool,
) -> Contributions:  # fmt: skip
    """Contributions of the triplets that the operator `triplet` returned, with `by_row` sorted."""
    chosen = torch.cat((positive, negative))
    order = begin = chosen
    if by_row:
        # stable, so that contributions to a row are added in the order of their anchors
        rows, order = torch.where(chosen < 0, M, chosen).sort(stable=True)
        begin = torch.searchsorted(rows, torch.arange(M + 1, device=rows.device))
    return Contributions(chosen, torch.cat((d_ap, d_an)), torch.cat((dd_ap, dd_an)), order, begin)
