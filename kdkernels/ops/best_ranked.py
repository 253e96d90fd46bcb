# SPDX-License-Identifier: Apache-2.0
"""best_ranked: which rows a teacher is right about, or nearly so."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._checks import accumulation_dtype
from kdkernels._similarity import similarities


@torch.no_grad()
def best_ranked(
    rows: Tensor,  # [B, D]
    keys: Tensor,  # [K, D]
    positives: Tensor,  # [B]
    share_of_wrong: float,
) -> Tensor:  # [B] bool
    """Rows whose positive is the nearest key by cosine, and a share of the others, best first.

    The others are ranked by how many keys are nearer than their positive, and the share is rounded
    down. Of equals, keys and rows, the first comes first. Nothing waits for the device. Takes
    memory for B x K similarities.

    Reference:
        Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020.
    """
    acc = accumulation_dtype(rows.dtype)  # fewer digits would make equals of what is not
    cosines = similarities(rows.to(acc), keys.to(acc), normalize=True)
    of_positive = cosines.gather(1, positives[:, None])
    earlier = torch.arange(keys.shape[0], device=rows.device) < positives[:, None]
    rank = ((cosines > of_positive) | ((cosines == of_positive) & earlier)).sum(
        1
    )  # [B] 0 where it is right
    right = (rank == 0).sum()
    # in fp64: a product of two fp32 numbers could round up to a whole one
    kept = right + ((rows.shape[0] - right).double() * share_of_wrong).floor()
    place = rank.argsort(stable=True).argsort()
    return place < kept
