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

import torch
from torch import Tensor

from kdkernels.triton.common.launch import arch_of, cdiv, on_device, supports
from kdkernels.triton.common.pairs import Pairs
from kdkernels.triton.rkd.angle_kernels import _rkd_angles_kernel, _rkd_squares_kernel
from kdkernels.triton.rkd.config import AngleConfig, pick_config
from kdkernels.triton.rkd.distance_kernels import _rkd_pairs_kernel, _rkd_sum_kernel

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
    gradient = student.new_zeros(student.shape if need else (0,), dtype=torch.float32)
    if B < 2:
        return gradient.new_zeros(()), gradient
    s, t = (Pairs(x, None, "euclidean", sides=2) for x in (student, teacher))
    (_, side_s), (_, side_t) = s.sides, t.sides
    pairs = B * (B - 1) / 2
    inverse_s, inverse_t = _inverse_mean(s, pairs), _inverse_mean(t, pairs)

    def sweep(first: int, rows: int, w: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the losses, sum of g h, which tiles are close), or with weights `w` the last."""
        tile = s.config.distances
        weights, counts = w.numel() > 0, s.tiles(rows)
        loss, product = s.new(2, 0 if weights else math.prod(counts), dtype=torch.float64)
        close = s.new(*(counts if weights else (0, 0)), dtype=torch.int32)
        _rkd_pairs_kernel[(math.prod(counts),)](
            s_ptr=side_s.x, t_ptr=side_t.x, given_s_ptr=side_s.given, given_t_ptr=side_t.given,
            s_norm_ptr=side_s.norm, t_norm_ptr=side_t.norm, inverse_s_ptr=inverse_s,
            inverse_t_ptr=inverse_t, shared_ptr=shared, loss_ptr=loss, product_ptr=product, w_ptr=w,
            close_ptr=close, first=first, rows=rows, B=B, D_s=s.D, D_t=t.D,
            WEIGHTS=weights, PRECISION=s.config.distance_precision, **tile.launch(),
        )  # fmt: skip
        return loss.sum(), product.sum(), close

    loss, product, _ = sweep(0, B, s.new(0), inverse_s)
    scale = 2 / B**2  # each pair stands for two
    if need:
        shared = (product / pairs).float()
        chunks = list(s.chunks())
        w = s.new(chunks[0][1], B)
        for first, rows in chunks:
            *_, close = sweep(first, rows, w[:rows], shared)
            gradient[first : first + rows] = s.gradient_of(w[:rows], first, close)
        gradient *= inverse_s * scale
    return (loss * scale).float(), gradient


def _inverse_mean(side: Pairs, pairs: float) -> Tensor:  # [] fp32
    """Of the distances of different rows; 0 where it would be infinite."""
    sums = side.new(math.prod(side.tiles(side.B)), dtype=torch.float64)
    _rkd_sum_kernel[(len(sums),)](sum_ptr=sums, **side.distance_arguments())
    total = sums.sum()
    return torch.where(total == 0, 0.0, pairs / total).float()


def _angle(student: Tensor, teacher: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    """Likewise."""
    B = len(student)
    if B < 2:
        gradient = student.new_zeros(student.shape if need else (0,), dtype=torch.float32)
        return gradient.new_zeros(()), gradient
    config = pick_config(arch_of(student))
    (q_s, scale), (q_t, _) = (_squares(x, config) for x in (student, teacher))
    loss, weight = _angles(q_s, q_t, config, vertex_in_tile=False, derivative=need)
    # where a row is at the place of another on one side only, the angle between the two and itself
    # is 0 there and 1 on the other side
    one_sided = ((q_s[0] == 0) != (q_t[0] == 0)).sum() / 2
    loss = ((2 * loss.sum() + one_sided) / B**3).float()
    if not need:
        return loss, student.new_empty(0, dtype=torch.float32)
    weight = weight.triu(1)  # no program writes below
    weight = weight + _angles(q_s, q_t, config, vertex_in_tile=True, derivative=True)[1]
    # in fp64, since the gradient is a difference of products
    weight = (weight + weight.mT).double() * (4 / B**3 / scale)
    x = student.double().contiguous()
    x = x - x.mean(0)
    return loss, (weight.sum(1, keepdim=True) * x - weight @ x).float()


def _squares(x: Tensor, config: AngleConfig) -> tuple[Tensor, Tensor]:
    """([3, B, B] as `_rkd_angles_kernel` takes them, with the largest 1; what they were divided
    by)."""
    B, D = x.shape
    length = config.split_length(B, D)
    q = x.new_empty(cdiv(D, max(length, 1)), B, B, dtype=torch.float64)
    if D > 0:
        _rkd_squares_kernel[(cdiv(B, config.m) * cdiv(B, config.n), len(q))](
            x_ptr=x.mT.contiguous(), out_ptr=q, B=B, D=D, split_length=length, BLOCK_M=config.m,
            BLOCK_N=config.n, num_warps=config.num_warps,
        )  # fmt: skip
    q = q.sum(0)
    largest = q.amax()
    scale = torch.where(largest == 0, 1.0, largest)  # NaN stays
    q = q / scale
    high = q.float()
    return torch.stack(
        (high, (q - high).float(), torch.where(q == 0, 0.0, q.rsqrt()).float())
    ), scale


def _angles(
    q_s: Tensor, q_t: Tensor, config: AngleConfig, *, vertex_in_tile: bool, derivative: bool
) -> tuple[Tensor, Tensor]:
    """(sums of the losses, sum of the derivatives by q_s)"""
    B = q_s.shape[1]
    length = config.split_length(B, B)
    tiles, splits = cdiv(B, config.m) * cdiv(B, config.n), cdiv(B, length)
    out = q_s.new_empty((splits, B, B) if derivative else (0, 0, 0))
    loss = q_s.new_empty(0 if vertex_in_tile else splits * tiles, dtype=torch.float64)
    _rkd_angles_kernel[(tiles, splits)](
        s_ptr=q_s, t_ptr=q_t, out_ptr=out, loss_ptr=loss, B=B, split_length=length,
        VERTEX_IN_TILE=vertex_in_tile, DERIVATIVE=derivative, BLOCK_M=config.m, BLOCK_N=config.n,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss, out.sum(0)
