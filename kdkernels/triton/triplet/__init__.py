# SPDX-License-Identifier: Apache-2.0
"""triplet on Triton: the operator pair.

Kernels are in `kernels.py`, configurations in `config.py`. Features are fp16, bf16 or fp32, and are
read as they are; everything accumulates in fp32. Nothing waits for the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.centre import Rows, centred
from kdkernels.triton.common.distances import DISTANCES
from kdkernels.triton.common.launch import (
    COLUMNS,
    ROWS,
    Arch,
    arch_of,
    cdiv,
    on_device,
    supports,
)
from kdkernels.triton.common.prepared import REMEMBERED, Launch
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
    y = labels.contiguous()
    r_y = y if in_batch else reference_labels.contiguous()
    plan = _forward(
        B, M, D, x.dtype, arch_of(x), fp32_matmul(), in_batch, exclude is not None, normalize,
        positives, negatives, soft, distance,
    )  # fmt: skip
    N = B if in_batch else B + M
    scales, norms = _new(x, N), _new(x, N)
    # Rows of fp32 are moved by a common point, of which no scale can tell: so unit rows are made.
    moved = x.dtype == torch.float32
    unit = _new(x, N, D) if moved and normalize else x
    winners = {
        "key_ptr": _new(x, 2, plan.splits, B),
        "row_ptr": _new(x, 2, plan.splits, B, dtype=torch.int32),
    }
    with on_device(embeddings):
        plan.prepare(x_ptr=x, r_ptr=r, scale_ptr=scales, norm_ptr=norms, unit_ptr=unit, **winners)
        anchors, others = Rows(x, x, norms[:B]), Rows(r, r, norms if in_batch else norms[B:])
        if moved:
            rows = unit if normalize else x
            bank = (unit[B:] if normalize else r) if not in_batch else None
            anchors, others = centred(rows[:B], bank)
        for search in plan.searches:
            search(
                x_ptr=anchors.x, r_ptr=others.x, given_x_ptr=anchors.given,
                given_r_ptr=others.given, x_norm_ptr=anchors.norm, r_norm_ptr=others.norm,
                scale_ptr=scales, **winners, x_label_ptr=y, r_label_ptr=r_y,
                exclude_ptr=y if exclude is None else exclude.contiguous(),
            )  # fmt: skip
        plan.distances(
            x_ptr=x, r_ptr=r, scale_ptr=scales, **winners, positive_ptr=positive,
            negative_ptr=negative, d_ap_ptr=d_ap, d_an_ptr=d_an, loss_ptr=losses, margin=margin,
        )  # fmt: skip
        plan.sums(
            loss_ptr=losses, positive_ptr=positive, total_ptr=total, nonzero_ptr=nonzero,
            valid_ptr=valid,
        )  # fmt: skip
    return results


class _Forward(NamedTuple):
    splits: int  # of the references, each with the best positive and negative of each anchor
    prepare: Launch
    searches: tuple[Launch, ...]
    distances: Launch
    sums: Launch


@lru_cache(REMEMBERED)
def _forward(
    B: int, M: int, D: int, dtype: torch.dtype, arch: Arch, matmul: str, in_batch: bool,
    excludes: bool, normalize: bool, positives: str, negatives: str, soft: bool, distance: str,
) -> _Forward:  # fmt: skip
    config = pick_config(B, M, dtype=dtype, arch=arch, fp32_matmul=matmul)
    paired = positives == "paired"

    def search(signs: dict[int, int], bound: int = _POSITIVE, floor: int = 0) -> Launch:
        """Search the sides in `signs`; with `floor`, beyond what side `bound` found before."""
        return Launch(
            kernels._triplet_mine_kernel, (cdiv(B, config.tile.m), config.splits), B=B, M=M, D=D,
            splits=config.splits, split_length=config.split_length, IN_BATCH=in_batch,
            EXCLUDES=excludes, SCALED=normalize and dtype != torch.float32,
            POSITIVE=signs.get(_POSITIVE, 0), NEGATIVE=signs.get(_NEGATIVE, 0), BOUND=bound,
            FLOOR=floor,
            DIFFERENCES=config.differences, PRECISION=config.precision, **config.tile.launch(),
        )  # fmt: skip

    # a semihard positive is the farthest within its bound, a semihard negative the nearest beyond
    signs = {
        _POSITIVE: 1 if positives == "easiest" else -1,
        _NEGATIVE: -1 if negatives == "easiest" else 1,
    }
    if paired:
        floor = -1 if negatives == "semihard" else 0
        searches = [search({_NEGATIVE: signs[_NEGATIVE]}, _POSITIVE, floor)]
    elif "semihard" not in (positives, negatives):
        searches = [search(signs)]
    else:
        free, bounded = (
            (_NEGATIVE, _POSITIVE) if positives == "semihard" else (_POSITIVE, _NEGATIVE)
        )
        searches = [
            search({free: signs[free]}),
            search({bounded: signs[bounded]}, free, signs[free] * signs[bounded]),
        ]
    return _Forward(
        config.splits,
        _prepare(B, M, D, config.splits, in_batch, paired, normalize, dtype == torch.float32),
        tuple(searches),
        Launch(
            kernels._triplet_distances_kernel, (cdiv(B, ROWS),), B=B, D=D, splits=config.splits,
            IN_BATCH=in_batch, NORMALIZE=normalize, DISTANCE=DISTANCES[distance], SOFT=soft,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        ),
        Launch(kernels._triplet_sums_kernel, (1,), B=B, BLOCK=SUMMED, num_warps=8),
    )  # fmt: skip


def _prepare(
    B: int, M: int, D: int, splits: int, in_batch: bool, paired: bool, normalize: bool, unit: bool
) -> Launch:
    """What each row is multiplied by and its squared norm then, [B + M], or [B] in batch; the rows
    then, where `unit` asks for them and they are not those given; the winners, if `paired`."""
    return Launch(
        kernels._triplet_prepare_kernel, (cdiv(B, ROWS) + (0 if in_batch else cdiv(M, ROWS)),),
        B=B, M=M, D=D, splits=splits, IN_BATCH=in_batch, PAIRED=paired, NORMALIZE=normalize,
        UNIT=unit and normalize,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip


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
    positive, negative, d_ap, d_an = (t.contiguous() for t in (positive, negative, d_ap, d_an))
    plan = _backward(
        B, M, D, in_batch, normalize, dloss.stride(0) if dloss.dim() else 0, soft, distance
    )
    # tensors that no kernel reads stand in for what is not needed
    scales = x
    entries = positive
    with on_device(embeddings):
        if normalize:
            scales, norms = _new(x, 2, B if in_batch else B + M)
            plan.prepare(
                x_ptr=x, r_ptr=r, scale_ptr=scales, norm_ptr=norms, unit_ptr=x, key_ptr=norms,
                row_ptr=_new(x, 0, dtype=torch.int32),
            )  # fmt: skip
        if need_references or (in_batch and need_embeddings):
            entries = _new(x, 2 * B, dtype=torch.int64)
            plan.entries(positive_ptr=positive, negative_ptr=negative, entry_ptr=entries)
            entries = entries.sort()[0]  # no two are equal
        for out, gradient in ((dx, plan.embeddings), (dr, plan.references)):
            if out.numel() > 0:
                gradient(
                    x_ptr=x, r_ptr=r, scale_ptr=scales, dout_ptr=out, dloss_ptr=dloss,
                    positive_ptr=positive, negative_ptr=negative, d_ap_ptr=d_ap, d_an_ptr=d_an,
                    entry_ptr=entries, margin=margin,
                )  # fmt: skip
    return dx, dr


class _Backward(NamedTuple):
    prepare: Launch
    # The contributions to chosen rows, as numbers that sort into the order of those rows, and for
    # each into that of the anchors; those of anchors without a triplet at the end.
    entries: Launch
    embeddings: Launch
    references: Launch


@lru_cache(REMEMBERED)
def _backward(
    B: int, M: int, D: int, in_batch: bool, normalize: bool, stride_dloss: int, soft: bool,
    distance: str,
) -> _Backward:  # fmt: skip
    columns, at_once = row_columns(D)

    def gradient(anchor: bool) -> Launch:
        return Launch(
            bwd_kernels._triplet_bwd_kernel, (B if anchor else M,), stride_dloss=stride_dloss, B=B,
            D=D, IN_BATCH=in_batch, NORMALIZE=normalize, DISTANCE=DISTANCES[distance], SOFT=soft,
            ANCHOR=anchor, CHOSEN=in_batch or not anchor, WHOLE=columns >= D, ENTRIES=at_once,
            COLUMNS=columns, num_warps=8,
        )  # fmt: skip

    return _Backward(
        _prepare(B, M, D, 1, in_batch, False, normalize, False),
        Launch(
            bwd_kernels._triplet_entries_kernel, (cdiv(2 * B, SORTED),), B=B, M=M, BLOCK=SORTED,
            num_warps=8,
        ),
        gradient(True),
        gradient(False),
    )  # fmt: skip


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
