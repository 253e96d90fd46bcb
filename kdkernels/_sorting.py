# SPDX-License-Identifier: Apache-2.0
"""Orders of rows that launchers of several backends prepare for their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pulls(NamedTuple):
    """The rows that anchors chose, and of each row by whom it was."""

    chosen: Tensor  # [2 B] int64: positives, then negatives; -1 where there is none
    d: Tensor  # [2 B] distances
    dd: Tensor  # [2 B] their gradients
    order: Tensor  # [2 B] int64: entries of the above in the order of the rows chosen, then anchors
    begin: Tensor  # [M + 1] int64: where those of each row begin; both are `chosen` if not wanted


def triplet_gradients(
    gradient: Callable[[Pulls, bool, bool], Tensor],
    dd_ap: Tensor,  # [B]
    dd_an: Tensor,  # [B]
    embeddings: Tensor,  # [B, D]
    references: Tensor,  # [M, D]
    positive: Tensor,  # [B] int64
    negative: Tensor,  # [B] int64
    d_ap: Tensor,  # [B]
    d_an: Tensor,  # [B]
    own: bool,
    need_embeddings: bool,
    need_references: bool,
) -> tuple[Tensor, Tensor]:
    """What the operator `triplet_bwd` returns, from its arguments.

    `gradient(pulls, anchor, chosen)` is that of rows that are anchors, or were chosen, or both; it
    may follow the pulls' order only where they were chosen.
    """
    need_references = need_references and not own
    by_row = own or need_references
    triplets = _pulls(positive, negative, d_ap, d_an, dd_ap, dd_an, len(references), by_row)
    return (
        gradient(triplets, True, own) if need_embeddings else embeddings.new_empty(0),
        gradient(triplets, False, True) if need_references else references.new_empty(0),
    )


def _pulls(
    positive: Tensor, negative: Tensor, d_ap: Tensor, d_an: Tensor, dd_ap: Tensor, dd_an: Tensor,
    M: int, by_row: bool,
) -> Pulls:  # fmt: skip
    """Of triplets as the operator `triplet` returns them; with `by_row` also sorted."""
    chosen = torch.cat((positive, negative))
    order = begin = chosen
    if by_row:
        # stable, so that the pulls on a row are added in the order of their anchors
        rows, order = torch.where(chosen < 0, M, chosen).sort(stable=True)
        begin = torch.searchsorted(rows, torch.arange(M + 1, device=rows.device))
    return Pulls(chosen, torch.cat((d_ap, d_an)), torch.cat((dd_ap, dd_an)), order, begin)
