# SPDX-License-Identifier: Apache-2.0
"""A call of a loss over many pairs of rows: anchors in chunks, and the gradient from weights on
distances; labelled rows in the order of their labels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul, sorted_exclude
from kdkernels.triton.common import pairs_kernels as kernels
from kdkernels.triton.common.centre import Rows, centred
from kdkernels.triton.common.distances import DISTANCES
from kdkernels.triton.common.launch import COLUMNS, ROWS, arch_of, cdiv, split_length
from kdkernels.triton.common.pairs_config import pick_config
from kdkernels.triton.common.sorted_rows import (
    _given_gradient_kernel,
    _sorted_rows_kernel,
    _sums_kernel,
)

SUMMED = 1024  # numbers that are added at a time


class Pairs:
    """Pairs of rows of x and r, or without r of x."""

    def __init__(
        self,
        x: Tensor,  # [B, D]
        r: Tensor | None,  # [M, D]
        distance: str,
        sides: int = 1,
    ) -> None:
        self.in_batch = r is None
        self.distance = DISTANCES[distance]
        self.sides = centred(x.contiguous(), None if r is None else r.contiguous())
        (self.B, self.D), self.M = x.shape, len(self.sides[1].x)
        self.config = pick_config(
            self.B, self.M, dtype=x.dtype, arch=arch_of(x),
            fp32_matmul=fp32_matmul(), sides=sides,
        )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.sides[0].x.device)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first anchor, number of anchors)"""
        for first in range(0, self.B, self.config.chunk):
            yield first, min(self.config.chunk, self.B - first)

    def distance_arguments(self) -> dict[str, object]:
        """Those of `distance_tile`, as kernels take them."""
        (x, r), tile = self.sides, self.config.distances
        return {
            "x_ptr": x.x, "r_ptr": r.x, "given_x_ptr": x.given, "given_r_ptr": r.given,
            "x_norm_ptr": x.norm, "r_norm_ptr": r.norm, "B": self.B, "M": self.M, "D": self.D,
            "IN_BATCH": self.in_batch,
            "DISTANCE": self.distance, "PRECISION": self.config.distance_precision, **tile.launch(),
        }  # fmt: skip

    def tiles(self, rows: int) -> tuple[int, int]:
        """Of the distances of so many anchors: down, across."""
        return cdiv(rows, self.config.distances.m), cdiv(self.M, self.config.distances.n)

    def gradient_of(
        self, w: Tensor, first: int, close: Tensor, *, references: bool = False
    ) -> Tensor:
        """The gradient that weights w [rows, M] of a chunk give its anchors, [rows, D], or the
        references, [M, D]: the sum of w_ik (x_i - r_k) over k, or that of w_ik (r_k - x_i) over i.
        """
        tile, step = self.config.gradient, self.config.distances
        anchors, r, close_n, close_k = self.sides[0], self.sides[1], step.m, step.n
        x = Rows(*(rows[first : first + len(w)] for rows in anchors))
        if references:
            x, r, close_n, close_k = r, x, close_k, close_n
        N, K = len(x.x), len(r.x)
        if self.D == 0:
            return self.new(N, 0)
        length = split_length(K, self.config.splits(N, self.D, K), close_k)
        splits = cdiv(K, length)
        out = self.new(splits, N, self.D)
        kernels._pairs_gradient_kernel[(tile.count(N, self.D), splits)](
            w_ptr=w, x_ptr=x.x, r_ptr=r.x, given_x_ptr=x.given, given_r_ptr=r.given,
            close_ptr=close, out_ptr=out, N=N, K=K, D=self.D, split_length=length,
            TRANSPOSED=references, PRECISION=self.config.gradient_precision, CLOSE_N=close_n,
            CLOSE_K=close_k, **tile.launch(),
        )  # fmt: skip
        return out[0] if splits == 1 else out.sum(0)


class Call(Pairs):
    """The rows of one call, sorted, with `normalize` unit rows. With `in_batch` the references are
    the embeddings."""

    def __init__(
        self,
        embeddings: Tensor,  # [B, D]
        labels: Tensor,  # [B] int64
        references: Tensor,  # [M, D]
        reference_labels: Tensor,  # [M] int64
        in_batch: bool,
        exclude: Tensor | None,  # [B] int64
        normalize: bool,
        distance: str,
        stretches: bool = False,
    ) -> None:
        """With `stretches`, `begin` and `end` say where the references with the label of each
        anchor begin and end, and `place` where each reference is."""
        self.normalize = normalize
        self.labels, self.order = labels.sort(stable=True)
        self.reference_labels, self.reference_order = self.labels, self.order
        if not in_batch:
            self.reference_labels, self.reference_order = reference_labels.sort(stable=True)
        x = embeddings.contiguous()
        self.given = x, x if in_batch else references.contiguous()
        super().__init__(*self._sorted(*self.given, in_batch, stretches), distance)
        self.leaves_out = exclude is not None
        # no kernel reads it where no anchor leaves a reference out
        self.exclude = self.order
        if exclude is not None:
            self.exclude = sorted_exclude(exclude, self.order, self.reference_order)

    def _sorted(
        self, x: Tensor, r: Tensor, in_batch: bool, stretches: bool
    ) -> tuple[Tensor, Tensor | None]:
        (B, D), M = x.shape, len(r)
        dtype = torch.float32 if self.normalize else x.dtype
        sorted_x = x.new_empty(x.shape, dtype=dtype)
        sorted_r = sorted_x if in_batch else r.new_empty(r.shape, dtype=dtype)
        self.begin = self.end = self.place = self.order
        if stretches:
            self.begin, self.end = self.order.new_empty(B), self.order.new_empty(B)
            self.place = self.order.new_empty(M)
        _sorted_rows_kernel[(cdiv(B, ROWS) + (0 if in_batch else cdiv(M, ROWS)),)](
            x_ptr=x, r_ptr=r, order_ptr=self.order, r_order_ptr=self.reference_order,
            label_ptr=self.labels, r_label_ptr=self.reference_labels, x_out_ptr=sorted_x,
            r_out_ptr=sorted_r, begin_ptr=self.begin, end_ptr=self.end, place_ptr=self.place,
            B=B, M=M, D=D, IN_BATCH=in_batch, STRETCHES=stretches, NORMALIZE=self.normalize,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        return sorted_x, None if in_batch else sorted_r

    def given_gradient(
        self, gradient: Tensor, more: Tensor | None = None, *, references: bool = False
    ) -> Tensor:
        """The gradient of rows as they were given, from that of sorted rows or its two parts."""
        given, order = self.given[references], (self.order, self.reference_order)[references]
        (N, D), out = given.shape, self.new(*given.shape)
        if out.numel() > 0:
            _given_gradient_kernel[(cdiv(N, ROWS),)](
                a_ptr=gradient, b_ptr=gradient if more is None else more, x_ptr=given,
                order_ptr=order, out_ptr=out, N=N, D=D, TWO=more is not None,
                NORMALIZE=self.normalize, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
            )  # fmt: skip
        return out

    def sums(self, losses: Tensor, *counts: Tensor) -> tuple[Tensor, ...]:
        """The sum of losses in fp32, and those of one or two kinds of counts."""
        total = self.new()
        found = [self.new(dtype=torch.int64) for _ in counts]
        _sums_kernel[(1,)](
            loss_ptr=losses, nonzero_ptr=counts[0], valid_ptr=counts[-1], total_out_ptr=total,
            nonzero_out_ptr=found[0], valid_out_ptr=found[-1], n=len(losses),
            VALID=len(counts) == 2, BLOCK=SUMMED, num_warps=4,
        )  # fmt: skip
        return total, *found

    def distances(self, first: int, rows: int, d: Tensor) -> Tensor:
        """Those of a chunk into `d`, [rows, M]; which of their tiles have close rows, int32."""
        close = self.new(*self.tiles(rows), dtype=torch.int32)
        kernels._pairs_distances_kernel[(close.numel(),)](
            d_ptr=d, close_ptr=close, first=first, rows=rows, **self.distance_arguments()
        )
        return close


def joined(parts: list[Tensor]) -> Tensor:
    """Rows of chunks, one after another."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
