# SPDX-License-Identifier: Apache-2.0
"""pkt on Triton: the operator and its launches.

Features are fp16, bf16 or fp32; products accumulate in fp32. Nothing waits for the device. Between
these kernels torch only adds up a product in splits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.centre import centred
from kdkernels.triton.common.launch import arch_of, cdiv, given, on_device, split_length, supports
from kdkernels.triton.common.pairs_kernels import _pairs_gradient_kernel
from kdkernels.triton.common.product import multiply
from kdkernels.triton.pkt import kernels, row_kernels
from kdkernels.triton.pkt.config import BLOCK, COLUMN_ROWS, COLUMNS, ROWS, pick_config

__all__ = ["pkt_fwd", "supports"]


NORM_EPS = {"kl": 1e-7, "jeffreys": 1e-6}


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
    loss, dx = torch.empty((), **fp32), torch.empty((B, D) if need_student else (0,), **fp32)
    with on_device(student):
        call = _Call(student, teacher, kernel, divergence)
        call.norms()
        if call.cosine:
            total = call.cosine_sums()
        else:
            call.add_up(call.tiles(SUMS=True), None)
        if not call.cosine or not need_student:
            call.add_up(call.tiles(LOSS=True), loss)
        if need_student:
            if call.cosine:
                call.cosine_gradient(total, dx, loss)
            else:
                call.student_t_gradient(dx)
    return loss, dx


class _Call:
    """The launches of one call."""

    def __init__(self, student: Tensor, teacher: Tensor, kernel: str, divergence: str) -> None:
        self.cosine, self.eps = kernel == "cosine", NORM_EPS[divergence]
        self.config = pick_config(
            dtype=student.dtype,
            arch=arch_of(student),
            fp32_matmul=fp32_matmul(),
            cosine=self.cosine,
        )
        self.given = student, teacher
        if not self.cosine:
            self.given = student.contiguous(), teacher.contiguous()
        self.x = s, t = self.given
        if not self.cosine:
            self.x = s, t = centred(s)[0].x, centred(t)[0].x
        (self.B, self.D), self.width = s.shape, max(s.shape[1], t.shape[1])
        self.rows = s.new_empty((8, self.B), dtype=torch.float32)  # see `kernels.py`
        self.options = {"COSINE": self.cosine, "KL": divergence == "kl"}
        self.sides = {
            "s_ptr": s, "t_ptr": t, "rows_ptr": self.rows, "B": self.B, "D_s": self.D,
            "D_t": t.shape[1], "stride_sm": s.stride(0), "stride_sd": s.stride(1),
            "stride_tm": t.stride(0), "stride_td": t.stride(1),
        }  # fmt: skip

    def norms(self) -> None:
        row_kernels._pkt_norms_kernel[(cdiv(self.B, ROWS), 2)](
            **self.sides, eps=self.eps, COSINE=self.cosine, ROWS=ROWS, COLUMNS=COLUMNS
        )

    def cosine_sums(self) -> Tensor:  # [2, parts, width]
        """1 / Z of all rows, from what this returns: the sums of the unit rows of both sides."""
        total = self._columns(2, self.rows, WEIGHTED=False)
        row_kernels._pkt_cosine_sums_kernel[(cdiv(self.B, ROWS), 2)](
            **self.sides, parts_ptr=total, width=self.width, parts=total.shape[1], ROWS=ROWS,
            COLUMNS=COLUMNS,
        )  # fmt: skip
        return total

    def _columns(self, sides: int, sums: Tensor, *, WEIGHTED: bool) -> Tensor:
        """[sides, parts, width] sums over rows."""
        blocks = cdiv(self.width, COLUMNS)
        length, parts = self.config.split_rows(self.B, sides * blocks)
        out = self.rows.new_empty((sides, parts, self.width))
        row_kernels._pkt_columns_kernel[(blocks, parts, sides)](
            **self.sides, sums_ptr=sums, parts_ptr=out, width=self.width, split_rows=length,
            splits=sums.shape[1], WEIGHTED=WEIGHTED, ROWS=COLUMN_ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
        return out

    def add_up(self, sums: Tensor, loss: Tensor | None) -> None:
        """What the tiles have summed over parts of the columns: 1 / Z, or the loss and r."""
        row_kernels._pkt_sums_kernel[(cdiv(self.B, BLOCK),)](
            sums_ptr=sums, rows_ptr=self.rows, loss_ptr=given(loss, sums), B=self.B,
            splits=sums.shape[1], LOSS=loss is not None, BLOCK=BLOCK,
        )  # fmt: skip

    def cosine_gradient(self, total: Tensor, dx: Tensor, loss: Tensor) -> None:
        sums, x = self._cosine_products(dx), self.x[0]
        weighted = self._columns(1, sums, WEIGHTED=True)
        row_kernels._pkt_cosine_bwd_kernel[(cdiv(self.B, ROWS),)](
            x_ptr=x, rows_ptr=self.rows, sums_ptr=sums, total_ptr=total, weighted_ptr=weighted,
            dx_ptr=dx, loss_ptr=loss, B=self.B, D=self.D, width=self.width, parts=total.shape[1],
            weighted_parts=weighted.shape[1], splits=sums.shape[1], stride_m=x.stride(0),
            stride_d=x.stride(1), eps=self.eps, ROWS=ROWS, COLUMNS=COLUMNS, BLOCK=BLOCK,
        )  # fmt: skip

    def _cosine_products(self, dx: Tensor) -> Tensor:  # [2, splits, B]
        """dx = W u in chunks of rows; losses and r."""
        x, config = self.x[0], self.config
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
        config, x, tile = self.config, self.x[0], self.config.tiles
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
                w_ptr=weights, x_ptr=x[first:last], r_ptr=x,
                given_x_ptr=self.given[0][first:last], given_r_ptr=self.given[0], close_ptr=close,
                out_ptr=out, N=N, K=self.B, D=self.D, split_length=length, TRANSPOSED=False,
                PRECISION=config.factors, CLOSE_N=tile.m, CLOSE_K=tile.n,
                **config.gradient.launch(),
            )  # fmt: skip
            if splits > 1:
                torch.sum(out, 0, out=dx[first:last])

    def tiles(self, **asked: bool) -> Tensor:  # [2, splits, B]
        sums = self._sums(self.B)
        self._launch(0, self.B, sums, None, None, **asked)
        return sums

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
        tile, splits = self.config.tiles, sums.shape[1]
        kernels._pkt_tiles_kernel[(cdiv(last - first, tile.m), splits)](
            **self.sides, given_s_ptr=self.given[0], given_t_ptr=self.given[1], sums_ptr=sums,
            w_ptr=given(weights, sums), close_ptr=given(close, sums), first=first, last=last,
            split_n=split_length(self.B, splits, tile.n), splits=splits, SUMS=SUMS, LOSS=LOSS,
            WEIGHTS=weights is not None,
            PRECISION=self.config.precision if self.cosine else self.config.distances,
            **self.options, **tile.launch(),
        )  # fmt: skip
