# SPDX-License-Identifier: Apache-2.0
"""A call of a loss over many pairs of rows: anchors in chunks, and the gradient from weights on
distances; labelled rows in the order of their labels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul, sorted_exclude
from kdkernels.triton.common import pairs_kernels as kernels
from kdkernels.triton.common.centre import Rows, centred
from kdkernels.triton.common.distances import DISTANCES
from kdkernels.triton.common.launch import arch_of, cdiv, split_length
from kdkernels.triton.common.pairs_config import pick_config


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
    """The rows of one call, sorted. With `in_batch` the references are the embeddings."""

    def __init__(
        self,
        embeddings: Tensor,  # [B, D]
        labels: Tensor,  # [B] int64
        references: Tensor,  # [M, D]
        reference_labels: Tensor,  # [M] int64
        in_batch: bool,
        exclude: Tensor | None,  # [B] int64
        distance: str,
    ) -> None:
        self.labels, self.order = labels.sort(stable=True)
        self.reference_labels, self.reference_order = self.labels, self.order
        if not in_batch:
            self.reference_labels, self.reference_order = reference_labels.sort(stable=True)
        super().__init__(
            embeddings[self.order], None if in_batch else references[self.reference_order], distance
        )
        self.leaves_out = exclude is not None
        # no kernel reads it where no anchor leaves a reference out
        self.exclude = self.order
        if exclude is not None:
            self.exclude = sorted_exclude(exclude, self.order, self.reference_order)

    @cached_property
    def begin(self) -> Tensor:  # [B] int64
        """Where the references with the label of each anchor begin."""
        return torch.searchsorted(self.reference_labels, self.labels)

    @cached_property
    def end(self) -> Tensor:  # [B] int64
        return torch.searchsorted(self.reference_labels, self.labels, right=True)

    def distances(self, first: int, rows: int, d: Tensor) -> Tensor:
        """Those of a chunk into `d`, [rows, M]; which of their tiles have close rows, int32."""
        close = self.new(*self.tiles(rows), dtype=torch.int32)
        kernels._pairs_distances_kernel[(close.numel(),)](
            d_ptr=d, close_ptr=close, first=first, rows=rows, **self.distance_arguments()
        )
        return close


def in_order(sorted_rows: Tensor, order: Tensor) -> Tensor:
    """Rows that were taken in `order`, back where they were."""
    return torch.empty_like(sorted_rows).index_copy_(0, order, sorted_rows)
