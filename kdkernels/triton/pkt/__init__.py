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
from kdkernels.triton.common.centre import centred
from kdkernels.triton.common.launch import arch_of, cdiv, given, on_device, split_length, supports
from kdkernels.triton.common.pairs_kernels import _pairs_gradient_kernel
from kdkernels.triton.common.product import multiply
from kdkernels.triton.pkt import kernels
from kdkernels.triton.pkt.config import ELEMENTS, PktConfig, pick_config

__all__ = ["pkt_fwd", "supports"]


NORM_EPS = {"kl": 1e-7, "jeffreys": 1e-6}


@dataclass
class _Side:
    given: Tensor  # [B, D]; of student_t contiguous
    x: Tensor  # [B, D], as its products take it: of student_t centred, of the strides of `given`
    self_term: Tensor  # [B] 1 - |u|, or squared norms
    # of cosine only
    wide: Tensor | None = None  # [B, D] fp32
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
    cosine, eps = kernel == "cosine", NORM_EPS[divergence]
    config = pick_config(
        dtype=student.dtype, arch=arch_of(student), fp32_matmul=fp32_matmul(), cosine=cosine
    )
    with on_device(student):
        make = _cosine_side if cosine else _student_t_side
        sides = [make(x, eps) for x in (student, teacher)]
        rows = torch.zeros((7, B), **fp32)  # see `kernels.py`
        for i, side in enumerate(sides):
            rows[2 + i] = side.self_term
            if side.scale is not None:
                rows[i] = side.scale
        tiles = _Tiles(config, *sides, rows, kernel, divergence)
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
            tiles.student_t_gradient(dx)
            return _total(loss), dx
        loss, r = tiles.gradient(dx)
        ratio = r.sum(0) / z[0]
        _cosine_backward(sides[0], ratio, dx, eps)
        return _total(loss), dx


class _Tiles:
    """Launches of the kernel over tiles of pairs."""

    def __init__(
        self,
        config: PktConfig,
        student: _Side,
        teacher: _Side,
        rows: Tensor,
        kernel: str,
        divergence: str,
    ) -> None:
        self.config, self.student, self.teacher, self.rows = config, student, teacher, rows
        self.B, self.D = student.x.shape
        self.cosine = kernel == "cosine"
        self.options = {"COSINE": self.cosine, "KL": divergence == "kl"}

    def run(self, **asked: bool) -> Tensor:  # [2, splits, B]
        sums = self._sums(self.B)
        self._launch(0, self.B, sums, None, None, **asked)
        return sums

    def gradient(self, dx: Tensor) -> Tensor:  # [2, splits, B]
        """dx = W u in chunks of rows, of cosine; losses and r."""
        x, config = self.student.x, self.config
        # fp16 could not hold weights
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        step = config.chunk(self.B, dtype.itemsize)
        w = x.new_empty((step, self.B), dtype=dtype)
        sums = self._sums(step)
        for first in range(0, self.B, step):
            weights = w[: min(step, self.B - first)]
            self._launch(first, first + len(weights), sums, weights, None, LOSS=True)
            product = (config.product, config.arch, config.weights)
            multiply(*product, weights, x, dx[first : first + len(weights)])
        return sums

    def student_t_gradient(self, dx: Tensor) -> None:
        """Row i of dx is the sum of w_ij (x_i - x_j), in chunks of rows."""
        if self.D == 0:
            return
        config, side, tile = self.config, self.student, self.config.tiles
        step = config.chunk(self.B, torch.float32.itemsize)
        w = self.rows.new_empty((step, self.B))
        close = w.new_empty((cdiv(step, tile.m), cdiv(self.B, tile.n)), dtype=torch.int32)
        sums = self._sums(step)
        for first in range(0, self.B, step):
            weights = w[: min(step, self.B - first)]
            N, last = len(weights), first + len(weights)
            self._launch(first, last, sums, weights, close)
            length = split_length(self.B, config.gradient_splits(N, self.D, self.B), tile.n)
            splits = cdiv(self.B, length)
            out = dx[None, first:last] if splits == 1 else dx.new_empty((splits, N, self.D))
            _pairs_gradient_kernel[(config.gradient.count(N, self.D), splits)](
                w_ptr=weights, x_ptr=side.x[first:last], r_ptr=side.x,
                given_x_ptr=side.given[first:last], given_r_ptr=side.given, close_ptr=close,
                out_ptr=out, N=N, K=self.B, D=self.D, split_length=length, TRANSPOSED=False,
                PRECISION=config.factors, CLOSE_N=tile.m, CLOSE_K=tile.n,
                **config.gradient.launch(),
            )  # fmt: skip
            if splits > 1:
                torch.sum(out, 0, out=dx[first:last])

    def _sums(self, rows: int) -> Tensor:
        """For launches of so many rows each."""
        splits = cdiv(self.B, self.config.split(rows, self.B))
        return self.rows.new_empty((2, splits, self.B))

    def _launch(
        self,
        first: int,
        last: int,
        sums: Tensor,
        weights: Tensor | None,  # [last - first, B]
        close: Tensor | None,  # of student_t, with weights
        SUMS: bool = False,
        LOSS: bool = False,
    ) -> None:
        s, t, B, tile = self.student.x, self.teacher.x, self.B, self.config.tiles
        splits = sums.shape[1]
        kernels._pkt_tiles_kernel[(cdiv(last - first, tile.m), splits)](
            s_ptr=s, t_ptr=t, given_s_ptr=self.student.given, given_t_ptr=self.teacher.given,
            rows_ptr=self.rows, sums_ptr=sums, w_ptr=given(weights, sums),
            close_ptr=given(close, sums), first=first, last=last, B=B, D_s=s.shape[1],
            D_t=t.shape[1], split_n=split_length(B, splits, tile.n), splits=splits,
            stride_sm=s.stride(0), stride_sd=s.stride(1), stride_tm=t.stride(0),
            stride_td=t.stride(1), SUMS=SUMS, LOSS=LOSS, WEIGHTS=weights is not None,
            PRECISION=self.config.precision if self.cosine else self.config.distances,
            **self.options, **tile.launch(),
        )  # fmt: skip


def _cosine_side(x: Tensor, eps: float) -> _Side:
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=1)
    scale = 1 / (norm + eps)
    return _Side(x, x, eps * scale, wide, norm, scale, (wide * scale[:, None]).sum(0))


def _student_t_side(x: Tensor, eps: float) -> _Side:
    rows, _ = centred(x.contiguous())
    return _Side(rows.given, rows.x, rows.norm)


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
