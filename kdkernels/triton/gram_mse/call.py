# SPDX-License-Identifier: Apache-2.0
"""A call of gram_mse on the host: options in the kernels' terms, launches that algorithms share."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.launch import COLUMNS, ROWS, arch_of, cdiv, split_length
from kdkernels.triton.gram_mse import product as kernels
from kdkernels.triton.gram_mse.config import ELEMENTS, GramMseConfig, pick_config
from kdkernels.triton.gram_mse.tile import PLAIN, ROW, TAYLOR


@dataclass(frozen=True)
class Call:
    student: Tensor  # [G, B, D_s]
    teacher: Tensor  # [G, B, D_t]
    normalize: str
    kernel: str
    gamma: float
    order: int
    algorithm: str

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """G, B, D_s, D_t."""
        return (*self.student.shape, self.teacher.shape[2])

    @cached_property
    def config(self) -> GramMseConfig:
        G, B, D_s, D_t = self.sizes
        return pick_config(
            G, B, D_s, D_t, algorithm=self.algorithm, dtype=self.student.dtype,
            arch=arch_of(self.student), fp32_matmul=fp32_matmul(),
        )  # fmt: skip

    @property
    def kept(self) -> torch.dtype:
        """Of the Grams or factors that a forward returns."""
        wide = self.algorithm == "factored" and self.student.dtype == torch.float32
        return torch.float64 if wide else torch.float32

    @property
    def scaled(self) -> bool:
        return self.normalize == "feature"

    @property
    def rows_normalised(self) -> bool:
        return self.normalize in ("row_l2", "row_l1")

    @property
    def epilogue(self) -> dict[str, Any]:
        """Arguments of the kernels that see Gram entries."""
        (two_gamma,) = struct.unpack("f", struct.pack("f", 2.0 * self.gamma))  # as fp32 holds it
        form = TAYLOR if self.kernel == "rbf_taylor" else ROW if self.rows_normalised else PLAIN
        return {
            "two_gamma": two_gamma,
            "two_gamma_low": 2.0 * self.gamma - two_gamma,
            "slope_factor": 8.0 * self.gamma * math.exp(-4.0 * self.gamma),
            "FORM": form.value,
            "L1": self.normalize == "row_l1",
            "SCALED": self.scaled,
            "ORDER": self.order if self.kernel == "rbf_taylor" else 0,
        }

    def scale_loss(self, squares: Tensor) -> Tensor:
        """The factor exp(-2 gamma) that the kernels leave out of the Taylor polynomial, squared."""
        return squares * math.exp(-4.0 * self.gamma) if self.kernel == "rbf_taylor" else squares

    @cached_property
    def strides(self) -> dict[str, int]:
        """Of student and teacher as [G, B, D], under the kernels' names."""
        names = [f"stride_{side}{axis}" for side in "st" for axis in "gbd"]
        return dict(zip(names, (*self.student.stride(), *self.teacher.stride()), strict=True))

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.student.device)

    def scales(self) -> Tensor:  # [5, G, B] fp32, or anything if features are not normalised
        """1 / |s|, 1 / |t|, their squares and their product, per row."""
        if not self.scaled:
            return self.student  # a pointer that no kernel follows
        G, B, D_s, D_t = self.sizes
        scale = self.new(5, G, B)
        kernels._gram_mse_norms_kernel[(G * cdiv(B, ROWS),)](
            s_ptr=self.student, t_ptr=self.teacher, scale_ptr=scale, G=G, B=B, D_s=D_s, D_t=D_t,
            **self.strides, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        return scale


def products(
    call: Call,
    s: Tensor,  # [G, M_s, K_s], any strides
    t: Tensor,  # [G, M_t, K_t], any strides
    wanted: str,  # which of "ss", "tt" and "ts", e.g. "ss ts"
    precision: str,
    weights: dict[str, Tensor] | None = None,  # per product, [G, K] fp32
) -> dict[str, Tensor]:  # [splits, G, M, M], upper tiles; "ts" [splits, G, M_t, M_s]
    """x diag(w) y^T for the wanted pairs, in partial sums over splits of the contraction."""
    tile, splits = call.config.product, call.config.splits
    G, M_s, K_s = s.shape
    M_t, K_t = t.shape[1:]
    n_s, n_t = cdiv(M_s, tile.m), cdiv(M_t, tile.m)
    tiles = {"ss": n_s * (n_s + 1) // 2, "tt": n_t * (n_t + 1) // 2, "ts": n_s * n_t}
    shapes = {"ss": (M_s, M_s), "tt": (M_t, M_t), "ts": (M_t, M_s)}
    parts = {name: call.new(splits, G, *shapes[name]) for name in wanted.split()}
    some = {name for name, part in parts.items() if part.numel() > 0}
    w = weights or {}
    grid = (G * sum(tiles[name] for name in some), splits)
    kernels._gram_mse_product_kernel[grid](
        s_ptr=s, t_ptr=t, w_ss_ptr=w.get("ss", s), w_tt_ptr=w.get("tt", s), w_ts_ptr=w.get("ts", s),
        ss_ptr=parts.get("ss", s), tt_ptr=parts.get("tt", s), ts_ptr=parts.get("ts", s), G=G,
        M_s=M_s, M_t=M_t, K_s=K_s, K_t=K_t, split_s=split_length(K_s, splits, tile.k),
        split_t=split_length(K_t, splits, tile.k), stride_sg=s.stride(0), stride_sm=s.stride(1),
        stride_sk=s.stride(2), stride_tg=t.stride(0), stride_tm=t.stride(1), stride_tk=t.stride(2),
        stride_wg=next(iter(w.values())).stride(0) if w else 0, SS="ss" in some, TT="tt" in some,
        TS="ts" in some, WEIGHTED=bool(w), PRECISION=precision, **tile.launch_square(),
    )  # fmt: skip
    return parts


def add_splits(call: Call, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full D x D factors, from what `products` left of features contracted over rows."""
    splits, G = next(iter(parts.values())).shape[:2]
    full = {
        name: part[0] if splits == 1 else torch.empty_like(part[0]) for name, part in parts.items()
    }
    some = {name: part for name, part in parts.items() if part.numel() > 0}
    any_part = next(iter(some.values()))
    _, _, M_s, M_t = call.sizes
    grid = (cdiv(max(full[name].numel() for name in some), ELEMENTS), 3)
    kernels._gram_mse_reduce_kernel[grid](
        ss_parts_ptr=some.get("ss", any_part), tt_parts_ptr=some.get("tt", any_part),
        ts_parts_ptr=some.get("ts", any_part), ss_ptr=full.get("ss", any_part),
        tt_ptr=full.get("tt", any_part), ts_ptr=full.get("ts", any_part), G=G, M_s=M_s, M_t=M_t,
        splits=splits, SS="ss" in some, TT="tt" in some, TS="ts" in some,
        BLOCK=call.config.product.m, ELEMENTS=ELEMENTS, num_warps=4,
    )  # fmt: skip
    return full


def coefficients(call: Call, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Loss per group and coefficients from sums over rows, [parts, G, 3 or 5, B]."""
    G, B = call.sizes[:2]
    coef, loss = call.new(G, 5, B, dtype=torch.float64), call.new(G, B)
    kernels._gram_mse_coef_kernel[(G * cdiv(B, COLUMNS),)](
        stats_ptr=stats, coef_ptr=coef, loss_ptr=loss, G=G, B=B, parts=len(stats),
        L1=call.normalize == "row_l1", ROWS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return loss.sum(1), coef


def uniform_coef(call: Call) -> Tensor:
    """a = -2, b = 2, c = 0: no row is normalised."""
    G, B = call.sizes[:2]
    coef = torch.zeros((G, 5, B), dtype=torch.float64, device=call.student.device)
    coef[:, 0].fill_(-2.0)
    coef[:, 1:3].fill_(2.0)
    return coef
