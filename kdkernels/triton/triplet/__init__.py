# SPDX-License-Identifier: Apache-2.0
"""triplet on Triton: the operator pair.

Kernels are in `kernels.py`, configurations in `config.py`. Features are fp16, bf16 or fp32, and are
read as they are; everything accumulates in fp32. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.distances import DISTANCES
from kdkernels.triton.common.launch import COLUMNS, ROWS, arch_of, cdiv, on_device, supports
from kdkernels.triton.triplet import bwd_kernels, kernels
from kdkernels.triton.triplet.config import SORTED, SUMMED, pick_config, row_columns

__all__ = ["supports", "triplet_bwd", "triplet_fwd"]


_POSITIVE, _NEGATIVE = 0, 1


def triplet_fwd(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B] int64
    references: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M] int64
    in_batch: bool,
    exclude: Tensor | None,  # [B] int64
    normalize: bool,
    positives: str,
    negatives: str,
    margin: float,
    soft: bool,
    distance: str,
) -> tuple[Tensor, ...]:
    (B, D), M = embeddings.shape, len(references)
    total, losses, d_ap, d_an = (_new(embeddings, *shape) for shape in ((), (B,), (B,), (B,)))
    nonzero, valid, positive, negative = (
        _new(embeddings, *shape, dtype=torch.int64) for shape in ((), (), (B,), (B,))
    )
    results = total, nonzero, valid, losses, positive, negative, d_ap, d_an
    if B == 0 or M == 0:
        for i, result in enumerate(results):
            result.fill_(-1 if i in (4, 5) else 0)
        return results
    x = embeddings.contiguous()
    r = x if in_batch else references.contiguous()
    with on_device(embeddings):
        stats, keys, rows = _winners(
            x, labels, r, reference_labels, in_batch, exclude, normalize, positives, negatives
        )
        kernels._triplet_distances_kernel[(cdiv(B, ROWS),)](
            x_ptr=x, r_ptr=r, stats_ptr=stats, key_ptr=keys, row_ptr=rows, positive_ptr=positive,
            negative_ptr=negative, d_ap_ptr=d_ap, d_an_ptr=d_an, loss_ptr=losses, margin=margin,
            B=B, D=D, splits=keys.shape[1], IN_BATCH=in_batch, NORMALIZE=normalize,
            DISTANCE=DISTANCES[distance], SOFT=soft, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        kernels._triplet_sums_kernel[(1,)](
            loss_ptr=losses, positive_ptr=positive, total_ptr=total, nonzero_ptr=nonzero,
            valid_ptr=valid, B=B, BLOCK=SUMMED, num_warps=8,
        )  # fmt: skip
    return results


def _winners(
    x: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    r: Tensor,  # [M, D]
    reference_labels: Tensor,  # [M]
    in_batch: bool,
    exclude: Tensor | None,  # [B]
    normalize: bool,
    positives: str,
    negatives: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of the rows; the best positive and negative of each anchor within each split
    of the references: keys and rows, [2, splits, B]."""
    (B, D), M = x.shape, len(r)
    config = pick_config(B, M, dtype=x.dtype, arch=arch_of(x), fp32_matmul=fp32_matmul())
    keys = _new(x, 2, config.splits, B)
    rows = _new(x, 2, config.splits, B, dtype=torch.int32)
    paired = positives == "paired"
    stats = _statistics(x, r, in_batch, normalize, (keys, rows) if paired else None)
    labels, reference_labels = labels.contiguous(), reference_labels.contiguous()
    left_out = labels if exclude is None else exclude.contiguous()  # labels are not read as such

    def mine(signs: dict[int, int], bound: int = _POSITIVE, floor: int = 0) -> None:
        """Search the sides in `signs`; with `floor`, beyond what side `bound` found before."""
        kernels._triplet_mine_kernel[(cdiv(B, config.tile.m), config.splits)](
            x_ptr=x, r_ptr=r, stats_ptr=stats, x_label_ptr=labels, r_label_ptr=reference_labels,
            key_ptr=keys, row_ptr=rows, exclude_ptr=left_out, B=B, M=M, D=D, splits=config.splits,
            split_length=config.split_length, IN_BATCH=in_batch, EXCLUDES=exclude is not None,
            NORMALIZE=normalize, POSITIVE=signs.get(_POSITIVE, 0),
            NEGATIVE=signs.get(_NEGATIVE, 0), BOUND=bound, FLOOR=floor,
            DIFFERENCES=config.differences, PRECISION=config.precision, **config.tile.launch(),
        )  # fmt: skip

    # a semihard positive is the farthest within its bound, a semihard negative the nearest beyond
    signs = {
        _POSITIVE: 1 if positives == "easiest" else -1,
        _NEGATIVE: -1 if negatives == "easiest" else 1,
    }
    if paired:
        del signs[_POSITIVE]
        mine(signs, _POSITIVE, -1 if negatives == "semihard" else 0)
    elif "semihard" not in (positives, negatives):
        mine(signs)
    else:
        free, bounded = (
            (_NEGATIVE, _POSITIVE) if positives == "semihard" else (_POSITIVE, _NEGATIVE)
        )
        mine({free: signs[free]})
        mine({bounded: signs[bounded]}, free, signs[free] * signs[bounded])
    return stats, keys, rows


def _statistics(
    x: Tensor,  # [B, D]
    r: Tensor,  # [M, D]
    in_batch: bool,
    normalize: bool,
    paired: tuple[Tensor, Tensor] | None = None,  # keys and rows, [2, splits, B]
) -> Tensor:
    """[B + M, 2]: what each row is multiplied by, and its squared norm then; [B, 2] in batch. Of
    `paired` the positives are set."""
    (B, D), M = x.shape, len(r)
    keys, rows = (x, x) if paired is None else paired
    stats = _new(x, B if in_batch else B + M, 2)
    kernels._triplet_prepare_kernel[(cdiv(B, ROWS) + (0 if in_batch else cdiv(M, ROWS)),)](
        x_ptr=x, r_ptr=r, stats_ptr=stats, key_ptr=keys, row_ptr=rows, B=B, M=M, D=D,
        splits=keys.shape[1], IN_BATCH=in_batch, PAIRED=paired is not None, NORMALIZE=normalize,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return stats


def triplet_bwd(
    dloss: Tensor,  # [] or [B]
    embeddings: Tensor,  # [B, D]
    references: Tensor,  # [M, D]
    positive: Tensor,  # [B] int64
    negative: Tensor,  # [B] int64
    d_ap: Tensor,  # [B]
    d_an: Tensor,  # [B]
    in_batch: bool,
    normalize: bool,
    need_embeddings: bool,
    need_references: bool,
    margin: float,
    soft: bool,
    distance: str,
) -> tuple[Tensor, Tensor]:
    (B, D), M = embeddings.shape, len(references)
    need_references = need_references and not in_batch
    dx = embeddings.new_empty((B, D) if need_embeddings else (0,))
    dr = references.new_empty((M, D) if need_references else (0,))
    if B == 0 or D == 0:
        return dx, dr.zero_()
    x = embeddings.contiguous()
    r = x if in_batch else references.contiguous()
    chosen = tuple(t.contiguous() for t in (positive, negative, d_ap, d_an))
    columns, entries_at_once = row_columns(D)
    with on_device(embeddings):
        # arguments that no kernel reads stand in for what is not needed
        stats = _statistics(x, r, in_batch, normalize) if normalize else x
        entries = positive
        if need_references or (in_batch and need_embeddings):
            entries = _entries(*chosen[:2], M)
        for out, anchor, was_chosen in ((dx, True, in_batch), (dr, False, True)):
            if out.numel() == 0:
                continue
            bwd_kernels._triplet_bwd_kernel[(len(out),)](
                x_ptr=x, r_ptr=r, stats_ptr=stats, dout_ptr=out, dloss_ptr=dloss,
                positive_ptr=chosen[0], negative_ptr=chosen[1], d_ap_ptr=chosen[2],
                d_an_ptr=chosen[3], entry_ptr=entries, margin=margin,
                stride_dloss=0 if dloss.dim() == 0 else dloss.stride(0), B=B, D=D,
                IN_BATCH=in_batch, NORMALIZE=normalize, DISTANCE=DISTANCES[distance], SOFT=soft,
                ANCHOR=anchor, CHOSEN=was_chosen, WHOLE=columns >= D, ENTRIES=entries_at_once,
                COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return dx, dr


def _entries(positive: Tensor, negative: Tensor, M: int) -> Tensor:  # [2 B] int64
    """The contributions to chosen rows, in the order of those rows, and for each in that of the
    anchors; those of anchors without a triplet at the end."""
    B = len(positive)
    entries = _new(positive, 2 * B, dtype=torch.int64)
    bwd_kernels._triplet_entries_kernel[(cdiv(2 * B, SORTED),)](
        positive_ptr=positive, negative_ptr=negative, entry_ptr=entries, B=B, M=M, BLOCK=SORTED,
        num_warps=4,
    )  # fmt: skip
    return entries.sort()[0]  # no two are equal


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
