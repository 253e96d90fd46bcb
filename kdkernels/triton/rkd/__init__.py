# SPDX-License-Identifier: Apache-2.0
"""rkd on Triton: the operator.

Distances sweep tiles three times: for their means, for the loss and for the gradient, whose weights
are made in chunks of rows that fit a buffer of a fixed size. Angles take squared distances in fp64,
B x B, and sweep tiles of pairs twice, once with all vertices and once with vertices in the tile, so
that no two programs add to one number. Features are fp16, bf16 or fp32. Nothing waits for the
device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdkernels.triton.common.launch import (
    COLUMNS,
    MOST_SPLITS,
    ROWS,
    arch_of,
    cdiv,
    on_device,
    split_length,
    supports,
)
from kdkernels.triton.common.pairs import Pairs
from kdkernels.triton.rkd.angle_kernels import (
    _rkd_angles_kernel,
    _rkd_largest_kernel,
    _rkd_pieces_kernel,
    _rkd_squares_kernel,
    _rkd_weights_kernel,
)
from kdkernels.triton.rkd.config import BLOCK, AngleConfig, pick_config
from kdkernels.triton.rkd.distance_kernels import (
    _rkd_loss_kernel,
    _rkd_means_kernel,
    _rkd_pairs_kernel,
    _rkd_sum_kernel,
)

__all__ = ["rkd_fwd", "supports"]


def rkd_fwd(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    relation: str,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    one_sided = _distance if relation == "distance" else _angle
    with on_device(student):
        loss, dstudent = one_sided(student, teacher, need_student)
        dteacher = student.new_empty(0, dtype=torch.float32)
        if need_teacher:  # huber is even
            dteacher = one_sided(teacher, student, True)[1]
    return loss, dstudent, dteacher


def _distance(student: Tensor, teacher: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    """The loss and its derivative by the student."""
    B = len(student)
    if B < 2:
        gradient = student.new_zeros(student.shape if need else (0,), dtype=torch.float32)
        return gradient.new_zeros(()), gradient
    s, t = (Pairs(x, None, "euclidean", sides=2) for x in (student, teacher))
    (_, side_s), (_, side_t) = s.sides, t.sides
    sides: dict[str, Any] = {
        "s_ptr": side_s.x, "t_ptr": side_t.x, "given_s_ptr": side_s.given,
        "given_t_ptr": side_t.given, "s_norm_ptr": side_s.norm, "t_norm_ptr": side_t.norm, "B": B,
        "D_s": s.D, "D_t": t.D, "PRECISION": s.config.distance_precision,
        **s.config.distances.launch(),
    }  # fmt: skip
    tiles = math.prod(s.tiles(B))
    sums, loss = s.new(2, tiles, dtype=torch.float64), s.new()
    inverse, factors = s.new(2), s.new(2)
    _rkd_sum_kernel[(tiles, 2)](**sides, sum_ptr=sums)
    of_tiles: dict[str, Any] = {"sum_ptr": sums, "inverse_ptr": inverse, "B": B, "tiles": tiles}
    _rkd_means_kernel[(2,)](**of_tiles, BLOCK=BLOCK)
    pairs = {**sides, "inverse_ptr": inverse, "sum_ptr": sums, "factors_ptr": factors}
    _rkd_pairs_kernel[(tiles,)](**pairs, w_ptr=sums, close_ptr=sums, first=0, rows=B, WEIGHTS=False)
    _rkd_loss_kernel[(1,)](**of_tiles, loss_ptr=loss, factors_ptr=factors, BLOCK=BLOCK)
    if not need:
        return loss, s.new(0)
    chunks = list(s.chunks())
    w, gradients = s.new(chunks[0][1], B), []
    for first, rows in chunks:
        close = s.new(*s.tiles(rows), dtype=torch.int32)
        _rkd_pairs_kernel[(close.numel(),)](
            **pairs, w_ptr=w, close_ptr=close, first=first, rows=rows, WEIGHTS=True
        )
        gradients.append(s.gradient_of(w[:rows], first, close))
    gradient = gradients[0] if len(chunks) == 1 else torch.cat(gradients)
    # here, since the kernel of the weights has no register left for the factor
    return loss, gradient.mul_(factors[1])


def _angle(student: Tensor, teacher: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    """Likewise."""
    B = len(student)
    if B < 2:
        gradient = student.new_zeros(student.shape if need else (0,), dtype=torch.float32)
        return gradient.new_zeros(()), gradient
    config = pick_config(arch_of(student))
    q, largest, apart = _squares(student, teacher, config)
    parts, losses = _angles(q, config, vertex_in_tile=False, derivative=need)
    loss = q.new_empty(())
    weights = q.new_empty((B, B) if need else 0, dtype=torch.float64)
    at_vertices = parts
    if need:
        at_vertices, _ = _angles(q, config, vertex_in_tile=True, derivative=True)
    _rkd_weights_kernel[(cdiv(B, ROWS) if need else 1,)](
        pairs_ptr=parts, vertices_ptr=at_vertices, largest_ptr=largest, losses_ptr=losses,
        apart_ptr=apart, weights_ptr=weights, loss_ptr=loss, B=B, splits=len(parts),
        parts=largest.shape[1], sums=losses.numel(), counts=apart.numel(),
        DERIVATIVE=need, PARTS=MOST_SPLITS, ROWS=ROWS, COLUMNS=COLUMNS, BLOCK=BLOCK,
    )  # fmt: skip
    if not need:
        return loss, student.new_empty(0, dtype=torch.float32)
    return loss, (weights @ student.double()).float()


def _squares(
    student: Tensor, teacher: Tensor, config: AngleConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """([2, 3, B, B] squared distances as `_rkd_angles_kernel` takes them, with the largest of a
    side 1; [2, parts] fp64, the largest of each part; [blocks] int32: how many pairs are at one
    place on one side only)."""
    B = len(student)
    s, t = (x.mT.contiguous() for x in (student, teacher))
    length, splits = config.split(B, max(len(s), len(t)), sides=2)
    parts = s.new_empty((2, splits, B, B), dtype=torch.float64)
    _rkd_squares_kernel[(config.tiles(B), splits, 2)](
        s_ptr=s, t_ptr=t, out_ptr=parts, B=B, D_s=len(s), D_t=len(t), split_length=length,
        BLOCK_M=config.m, BLOCK_N=config.n, num_warps=config.num_warps,
    )  # fmt: skip
    span = split_length(B * B, MOST_SPLITS, BLOCK)
    largest = parts.new_empty((2, cdiv(B * B, span)))
    _rkd_largest_kernel[(largest.shape[1], 2)](
        q_ptr=parts, largest_ptr=largest, B=B, splits=splits, split_span=span, BLOCK=BLOCK
    )
    q = parts.new_empty((2, 3, B, B), dtype=torch.float32)
    apart = parts.new_empty(cdiv(B * B, BLOCK), dtype=torch.int32)
    _rkd_pieces_kernel[(len(apart),)](
        q_ptr=parts, largest_ptr=largest, out_ptr=q, apart_ptr=apart, B=B, splits=splits,
        parts=largest.shape[1], PARTS=MOST_SPLITS, BLOCK=BLOCK,
    )  # fmt: skip
    return q, largest, apart


def _angles(
    q: Tensor, config: AngleConfig, *, vertex_in_tile: bool, derivative: bool
) -> tuple[Tensor, Tensor]:
    """([splits, B, B] parts of the derivatives by the student's q, [splits, tiles] losses)"""
    B = q.shape[-1]
    length, splits = config.split(B, B)
    out = q.new_empty((splits, B, B) if derivative else (1, 0, 0))
    loss = q.new_empty(0 if vertex_in_tile else splits * config.tiles(B), dtype=torch.float64)
    _rkd_angles_kernel[(config.tiles(B), splits)](
        s_ptr=q[0], t_ptr=q[1], out_ptr=out, loss_ptr=loss, B=B, split_length=length,
        VERTEX_IN_TILE=vertex_in_tile, DERIVATIVE=derivative, BLOCK_M=config.m, BLOCK_N=config.n,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out, loss
