# SPDX-License-Identifier: Apache-2.0
"""triplet on Triton: the operator pair.

Kernels, configurations and what is compiled ahead of time are in the modules `_triplet_*` beside
this one. Features are fp16, bf16 or fp32; everything accumulates in fp32. Nothing waits for the
device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import Contributions, fp32_matmul, triplet_gradients
from kdkernels.triton.common.centre import centred
from kdkernels.triton.common.distances import DISTANCES, FINITE
from kdkernels.triton.common.launch import COLUMNS, ROWS, arch_of, cdiv, on_device, supports
from kdkernels.triton.triplet import kernels
from kdkernels.triton.triplet.config import ENTRIES, pick_config

__all__ = ["supports", "triplet_bwd", "triplet_fwd"]


_POSITIVE, _NEGATIVE = 0, 1


def triplet_fwd(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B] int64
    references: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M] int64
    in_batch: bool,
    exclude: Tensor | None,  # [B] int64
    positives: str,
    negatives: str,
    distance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, D), M = embeddings.shape, len(references)
    positive, negative = (_new(embeddings, B, dtype=torch.int64) for _ in range(2))
    d_ap, d_an = (_new(embeddings, B) for _ in range(2))
    if B == 0 or M == 0:
        return positive.fill_(-1), negative.fill_(-1), d_ap.zero_(), d_an.zero_()
    with on_device(embeddings):
        keys, rows = _winners(
            embeddings, labels, references, reference_labels, in_batch, exclude, positives,
            negatives,
        )  # fmt: skip
        kernels._triplet_distances_kernel[(cdiv(B, ROWS),)](
            x_ptr=embeddings, r_ptr=references, key_ptr=keys, row_ptr=rows, positive_ptr=positive,
            negative_ptr=negative, d_ap_ptr=d_ap, d_an_ptr=d_an, B=B, D=D, splits=keys.shape[1],
            **_strides(embeddings, references), DISTANCE=DISTANCES[distance], ROWS=ROWS,
            COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    return positive, negative, d_ap, d_an


def _winners(
    x: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    r: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M]
    in_batch: bool,
    exclude: Tensor | None,  # [B]
    positives: str,
    negatives: str,
) -> tuple[Tensor, Tensor]:  # keys and rows, [2, splits, B]
    """The best positive and negative of each anchor within each split of the references."""
    (B, D), M = x.shape, len(r)
    config = pick_config(B, M, dtype=x.dtype, arch=arch_of(x), fp32_matmul=fp32_matmul())
    anchors, candidates = centred(x, None if in_batch else r)
    x_norm, r_norm = anchors.norm, candidates.norm
    keys = _new(x, 2, config.splits, B)
    rows = _new(x, 2, config.splits, B, dtype=torch.int32)

    def mine(signs: dict[int, int], bound: int = _POSITIVE, floor: int = 0) -> None:
        """Search the sides in `signs`; with `floor`, beyond what side `bound` found before."""
        kernels._triplet_mine_kernel[(cdiv(B, config.tile.m), config.splits)](
            x_ptr=anchors.x, r_ptr=candidates.x, given_x_ptr=anchors.given,
            given_r_ptr=candidates.given, x_norm_ptr=x_norm, r_norm_ptr=r_norm, x_label_ptr=labels,
            r_label_ptr=reference_labels, key_ptr=keys, row_ptr=rows, floor_key_ptr=keys[bound],
            floor_row_ptr=rows[bound], exclude_ptr=left_out, B=B, M=M, D=D,
            splits=config.splits, split_length=config.split_length,
            **_strides(anchors.x, candidates.x),
            **_strides(anchors.given, candidates.given, "stride_g"), IN_BATCH=in_batch,
            EXCLUDES=exclude is not None, POSITIVE=signs.get(_POSITIVE, 0),
            NEGATIVE=signs.get(_NEGATIVE, 0), FLOOR=floor, DIFFERENCES=config.differences,
            PRECISION=config.precision, **config.tile.launch(),
        )  # fmt: skip

    labels, reference_labels = labels.contiguous(), reference_labels.contiguous()
    left_out = labels if exclude is None else exclude.contiguous()  # labels are not read as such
    # a semihard positive is the farthest within its bound, a semihard negative the nearest beyond
    signs = {
        _POSITIVE: 1 if positives == "easiest" else -1,
        _NEGATIVE: -1 if negatives == "easiest" else 1,
    }
    if positives == "paired":
        del signs[_POSITIVE]
        d2 = (x.float() - r.float()).square().sum(1)
        keys[_POSITIVE].fill_(torch.inf)
        rows[_POSITIVE].fill_(-1)
        # a pair at a distance of NaN is a pair all the same
        finite = torch.maximum(x_norm, r_norm) < FINITE.value
        keys[_POSITIVE, 0] = torch.where(finite, -d2, -torch.inf)
        rows[_POSITIVE, 0] = torch.arange(B, device=x.device, dtype=torch.int32)
        mine(signs, _POSITIVE, -1 if negatives == "semihard" else 0)
    elif "semihard" not in (positives, negatives):
        mine(signs)
    else:
        free, bounded = (
            (_NEGATIVE, _POSITIVE) if positives == "semihard" else (_POSITIVE, _NEGATIVE)
        )
        mine({free: signs[free]})
        mine({bounded: signs[bounded]}, free, signs[free] * signs[bounded])
    return keys, rows


def triplet_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    *args, distance = args
    embeddings, references = args[2:4]
    B, D = embeddings.shape

    def gradient(contributions: Contributions, anchor: bool, was_chosen: bool) -> Tensor:
        chosen, d, dd, order, begin = contributions
        out = embeddings.new_empty((B if anchor else len(references), D))
        if out.numel() > 0:
            kernels._triplet_bwd_kernel[(len(out), cdiv(D, COLUMNS))](
                x_ptr=embeddings, r_ptr=references, dout_ptr=out, chosen_ptr=chosen, d_ptr=d,
                dd_ptr=dd, order_ptr=order, begin_ptr=begin, B=B, D=D,
                **_strides(embeddings, references), DISTANCE=DISTANCES[distance], ANCHOR=anchor,
                CHOSEN=was_chosen, ENTRIES=ENTRIES, COLUMNS=COLUMNS, num_warps=4,
            )  # fmt: skip
        return out

    with on_device(embeddings):
        return triplet_gradients(gradient, *args)


def _strides(x: Tensor, r: Tensor, prefix: str = "stride_") -> dict[str, int]:
    names = (prefix + name for name in ("xb", "xd", "rm", "rd"))
    return dict(zip(names, (*x.stride(), *r.stride()), strict=True))


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
