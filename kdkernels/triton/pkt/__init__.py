# SPDX-License-Identifier: Apache-2.0
"""pkt on Triton: the operator and its launches.

Configurations and kernels are in the modules `_pkt_*` beside this one. Features are fp16, bf16 or
fp32; products accumulate in fp32. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.launch import arch_of, cdiv, given, on_device, split_length, supports
from kdkernels.triton.common.product import multiply
from kdkernels.triton.pkt import kernels
from kdkernels.triton.pkt.config import ELEMENTS, PktConfig, pick_config

__all__ = ["pkt_fwd", "supports"]


NORM_EPS = {"kl": 1e-7, "jeffreys": 1e-6}


@dataclass
class _Side:
    x: Tensor  # [B, D], as its products take it
    wide: Tensor  # [B, D] fp32
    self_term: Tensor  # [B] 1 - |u|, or squared norms
    # of cosine only
    norm: Tensor | None = None  # [B]
    scale: Tensor | None = None  # [B] 1 / (|x| + eps)
    total: Tensor | None = None  # [D] sum of u


def pkt_fwd(
    student: Tensor,  # [B, D_s]
    teacher: Tensor,  # [B, D_t]
    kernel: str,
    divergence: str,
    need_student: bool,
) -> tuple[Tensor, Tensor]:
    (B, D), fp32 = student.shape, {"dtype": torch.float32, "device": student.device}
    if B == 0:
        return torch.zeros((), **fp32), torch.empty((0, D) if need_student else (0,), **fp32)
    config = pick_config(
        dtype=student.dtype, arch=arch_of(student),
        fp32_matmul=fp32_matmul(),
    )  # fmt: skip
    cosine, eps = kernel == "cosine", NORM_EPS[divergence]
    with on_device(student):
        make = _cosine_side if cosine else _student_t_side
        sides = [make(x, eps) for x in (student, teacher)]
        rows = torch.zeros((7, B), **fp32)  # see `kernels.py`
        for i, side in enumerate(sides):
            rows[2 + i] = side.self_term
            if side.scale is not None:
                rows[i] = side.scale
        tiles = _Tiles(config, *(side.x for side in sides), rows, kernel, divergence)
        if cosine:
            z = torch.stack([((s.wide * s.total).sum(1) * s.scale + B) / 2 for s in sides])
        else:
            z = tiles.run(SUMS=True)[:2].sum(1)
        rows[4:6] = 1 / z
        if not cosine or not need_student:
            loss, r = tiles.run(LOSS=True)[:2]
            r = r.sum(0)
            rows[6] = r
        if not need_student:
            return _total(loss), torch.empty(0, **fp32)
        dx = torch.empty((B, D), **fp32)
        if not cosine:
            _, weight = tiles.gradient(dx, LOSS=False)
            torch.addcmul(-dx, weight[:, None], sides[0].wide, out=dx)
            return _total(loss), dx.mul_(2)
        (loss, r), _ = tiles.gradient(dx, LOSS=True)
        ratio = r.sum(0) / z[0]
        _cosine_backward(sides[0], ratio, dx, eps)
        return _total(loss), dx


class _Tiles:
    """Launches of the kernel over tiles of pairs."""

    def __init__(
        self,
        config: PktConfig,
        student: Tensor,
        teacher: Tensor,
        rows: Tensor,
        kernel: str,
        divergence: str,
    ) -> None:
        self.config, self.student, self.teacher, self.rows = config, student, teacher, rows
        self.options = {"COSINE": kernel == "cosine", "KL": divergence == "kl"}

    def run(self, **asked: bool) -> Tensor:  # [3, splits, B]
        B = len(self.student)
        sums = self._sums(B)
        self._launch(0, B, sums, None, **asked)
        return sums

    def gradient(self, dx: Tensor, LOSS: bool) -> tuple[Tensor, Tensor]:
        """dx = W x in chunks of rows; (losses and r [2, splits, B], sums of weights [B])."""
        B, config = len(self.student), self.config
        # fp16 could not hold weights
        half = self.student.dtype == torch.float16
        dtype = torch.float32 if half else self.student.dtype
        step = config.chunk(B, dtype.itemsize)
        w = self.student.new_empty((step, B), dtype=dtype)
        sums = self._sums(step)
        for first in range(0, B, step):
            last = min(first + step, B)
            weights = w[: last - first]
            self._launch(first, last, sums, weights, LOSS=LOSS)
            product = (config.product, config.arch, config.weights)
            multiply(*product, weights, self.student, dx[first:last])
        return sums[:2], sums[2].sum(0)

    def _sums(self, rows: int) -> Tensor:
        """For launches of so many rows each."""
        B = len(self.student)
        splits = cdiv(B, self.config.split(rows, B))
        return self.rows.new_empty((3, splits, B))

    def _launch(
        self,
        first: int,
        last: int,
        sums: Tensor,
        weights: Tensor | None,  # [last - first, B]
        SUMS: bool = False,
        LOSS: bool = False,
    ) -> None:
        (B, D_s), D_t, tile = self.student.shape, self.teacher.shape[1], self.config.tiles
        splits = sums.shape[1]
        kernels._pkt_tiles_kernel[(cdiv(last - first, tile.m), splits)](
            s_ptr=self.student, t_ptr=self.teacher, rows_ptr=self.rows, sums_ptr=sums,
            w_ptr=given(weights, sums), first=first, last=last,
            B=B, D_s=D_s, D_t=D_t, split_n=split_length(B, splits, tile.n), splits=splits,
            stride_sm=self.student.stride(0), stride_sd=self.student.stride(1),
            stride_tm=self.teacher.stride(0), stride_td=self.teacher.stride(1),
            SUMS=SUMS, LOSS=LOSS, WEIGHTS=weights is not None,
            PRECISION=self.config.precision, **self.options, **tile.launch(),
        )  # fmt: skip


def _cosine_side(x: Tensor, eps: float) -> _Side:
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=1)
    scale = 1 / (norm + eps)
    return _Side(x, wide, eps * scale, norm, scale, (wide * scale[:, None]).sum(0))


def _student_t_side(x: Tensor, eps: float) -> _Side:
    # Distances stay, and rows close together keep more of theirs; products of half precision are
    # exact as they are, and would not be of rounded differences.
    if x.dtype == torch.float32:
        x = x - x.mean(0)
    wide = x.float()
    return _Side(x, wide, wide.square().sum(1))


def _cosine_backward(side: _Side, ratio: Tensor, dx: Tensor, eps: float) -> None:
    if dx.numel() == 0:
        return
    weighted = (side.wide * (ratio * side.scale)[:, None]).sum(0)
    kernels._pkt_cosine_bwd_kernel[(len(dx),)](
        x_ptr=side.x, norm_ptr=side.norm, ratio_ptr=ratio, total_ptr=side.total,
        weighted_ptr=weighted, dx_ptr=dx, D=dx.shape[1],
        stride_m=side.x.stride(0), stride_d=side.x.stride(1), EPS=eps, BLOCK=ELEMENTS,
    )  # fmt: skip


def _total(losses: Tensor) -> Tensor:
    return losses.sum(dtype=torch.float64).float()
