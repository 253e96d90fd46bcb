# SPDX-License-Identifier: Apache-2.0
"""A call of gram_mse on the host: what is decided once for calls that are alike, and launches that
algorithms share."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.launch import COLUMNS, ROWS, Arch, arch_of, cdiv, split_length
from kdkernels.triton.common.prepared import REMEMBERED, Launch
from kdkernels.triton.gram_mse import product as kernels
from kdkernels.triton.gram_mse.config import ELEMENTS, GramMseConfig, pick_config
from kdkernels.triton.gram_mse.tile import PLAIN, ROW, TAYLOR


@dataclass(frozen=True, eq=False)
class Call:
    """What a call is, but for its tensors. Calls that are alike share one."""

    sizes: tuple[int, int, int, int]  # G, B, D_s, D_t
    student_strides: tuple[int, ...]  # of [G, B, D_s]
    teacher_strides: tuple[int, ...]
    dtype: torch.dtype
    normalize: str
    kernel: str
    order: int
    algorithm: str
    arch: Arch
    fp32_matmul: str

    @cached_property
    def config(self) -> GramMseConfig:
        return pick_config(
            *self.sizes, algorithm=self.algorithm, dtype=self.dtype, arch=self.arch,
            fp32_matmul=self.fp32_matmul,
        )  # fmt: skip

    @cached_property
    def kept(self) -> torch.dtype:
        """Of the Grams or factors that a forward returns."""
        wide = self.algorithm == "factored" and self.dtype == torch.float32
        return torch.float64 if wide else torch.float32

    @cached_property
    def scaled(self) -> bool:
        return self.normalize == "feature"

    @cached_property
    def rows_normalised(self) -> bool:
        return self.normalize in ("row_l2", "row_l1")

    @cached_property
    def epilogue(self) -> dict[str, Any]:
        """Constants of the kernels that see Gram entries."""
        form = TAYLOR if self.kernel == "rbf_taylor" else ROW if self.rows_normalised else PLAIN
        return {
            "FORM": form.value,
            "L1": self.normalize == "row_l1",
            "SCALED": self.scaled,
            "ORDER": self.order if self.kernel == "rbf_taylor" else 0,
        }

    @cached_property
    def strides(self) -> dict[str, int]:
        """Of student and teacher as [G, B, D], under the kernels' names."""
        names = [f"stride_{side}{axis}" for side in "st" for axis in "gbd"]
        return dict(zip(names, (*self.student_strides, *self.teacher_strides), strict=True))

    @cached_property
    def _norms(self) -> Launch:
        G, B, D_s, D_t = self.sizes
        return Launch(
            kernels._gram_mse_norms_kernel, (G * cdiv(B, ROWS),), G=G, B=B, D_s=D_s, D_t=D_t,
            **self.strides, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip

    def scales(self, student: Tensor, teacher: Tensor) -> Tensor:  # [5, G, B] fp32
        """1 / |s|, 1 / |t|, their squares and their product, per row; anything if features are not
        normalised."""
        if not self.scaled:
            return student  # a pointer that no kernel follows
        scale = new(student, 5, *self.sizes[:2])
        self._norms(s_ptr=student, t_ptr=teacher, scale_ptr=scale)
        return scale


_call = lru_cache(REMEMBERED)(Call)


def call_of(
    student: Tensor,  # [G, B, D_s]
    teacher: Tensor,  # [G, B, D_t]
    normalize: str,
    kernel: str,
    order: int,
    algorithm: str,
) -> Call:
    """The call on these tensors."""
    sizes = (*student.shape, teacher.shape[2])
    return _call(
        sizes, student.stride(), teacher.stride(), student.dtype, normalize, kernel, order,
        algorithm, arch_of(student), fp32_matmul(),
    )  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What the kernels that see Gram entries take for gamma, of which they read the Taylor
    polynomial only: floats, which may change from step to step."""

    exponent: dict[str, float]
    loss_factor: float  # exp(-2 gamma), which they leave out of the polynomial, squared
    slope_factor: float


@lru_cache(REMEMBERED)
def curve(kernel: str, gamma: float) -> Curve:
    (two_gamma,) = struct.unpack("f", struct.pack("f", 2.0 * gamma))  # as fp32 holds it
    exponent = {"two_gamma": two_gamma, "two_gamma_low": 2.0 * gamma - two_gamma}
    factor = math.exp(-4.0 * gamma)
    loss_factor = factor if kernel == "rbf_taylor" else 1.0
    return Curve(exponent, loss_factor, 8.0 * gamma * factor)


def new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


@dataclass(frozen=True)
class _Products:
    """A launch of products, and the parts that it leaves."""

    launch: Launch
    parts: dict[str, tuple[int, ...]]  # by name of the product; an empty one is not computed


@lru_cache(REMEMBERED)
def _products(call: Call, wanted: str, factors: bool, weight_stride: int | None) -> _Products:
    G, B, D_s, D_t = call.sizes
    tile, splits = call.config.product, call.config.splits
    precision = call.config.precision.factors if factors else call.config.precision.features
    M_s, K_s, M_t, K_t = (D_s, B, D_t, B) if factors else (B, D_s, B, D_t)
    n_s, n_t = cdiv(M_s, tile.m), cdiv(M_t, tile.m)
    tiles = {"ss": n_s * (n_s + 1) // 2, "tt": n_t * (n_t + 1) // 2, "ts": n_s * n_t}
    shapes = {"ss": (M_s, M_s), "tt": (M_t, M_t), "ts": (M_t, M_s)}
    parts = {name: (splits, G, *shapes[name]) for name in wanted.split()}
    some = {name for name, shape in parts.items() if 0 not in shape}
    m, k = (2, 1) if factors else (1, 2)
    (sg, sm, sk), (tg, tm, tk) = (
        (strides[0], strides[m], strides[k])
        for strides in (call.student_strides, call.teacher_strides)
    )
    launch = Launch(
        kernels._gram_mse_product_kernel, (G * sum(tiles[name] for name in some), splits), G=G,
        M_s=M_s, M_t=M_t, K_s=K_s, K_t=K_t, split_s=split_length(K_s, splits, tile.k),
        split_t=split_length(K_t, splits, tile.k), stride_sg=sg, stride_sm=sm, stride_sk=sk,
        stride_tg=tg, stride_tm=tm, stride_tk=tk, stride_wg=weight_stride or 0, SS="ss" in some,
        TT="tt" in some, TS="ts" in some, WEIGHTED=weight_stride is not None, PRECISION=precision,
        **tile.launch_square(),
    )  # fmt: skip
    return _Products(launch, parts)


def products(
    call: Call,
    student: Tensor,  # [G, B, D_s]
    teacher: Tensor,  # [G, B, D_t]
    wanted: str,  # which of "ss", "tt" and "ts", e.g. "ss ts"
    *,
    factors: bool = False,  # contracted over rows, not over features
    weights: dict[str, Tensor] | None = None,  # per product, [G, K] fp32 or fp64, with one stride
) -> dict[str, Tensor]:  # [splits, G, M, M], upper tiles; "ts" [splits, G, M_t, M_s]
    """x diag(w) y^T for the wanted pairs, in partial sums over splits of the contraction."""
    w = weights or {}
    weight_stride = next(iter(w.values())).stride(0) if w else None
    plan = _products(call, wanted, factors, weight_stride)
    parts = {name: new(student, *shape) for name, shape in plan.parts.items()}
    plan.launch(
        s_ptr=student, t_ptr=teacher, w_ss_ptr=w.get("ss", student), w_tt_ptr=w.get("tt", student),
        w_ts_ptr=w.get("ts", student), ss_ptr=parts.get("ss", student),
        tt_ptr=parts.get("tt", student), ts_ptr=parts.get("ts", student),
    )  # fmt: skip
    return parts


@lru_cache(REMEMBERED)
def _add_splits(call: Call, some: tuple[str, ...]) -> Launch:
    G, _, D_s, D_t = call.sizes
    largest = G * max(D_s, D_t) ** 2
    return Launch(
        kernels._gram_mse_reduce_kernel, (cdiv(largest, ELEMENTS), 3), G=G, M_s=D_s, M_t=D_t,
        splits=call.config.splits, SS="ss" in some, TT="tt" in some, TS="ts" in some,
        BLOCK=call.config.product.m, ELEMENTS=ELEMENTS, num_warps=4,
    )  # fmt: skip


def add_splits(call: Call, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full D x D factors, from what `products` left of features contracted over rows."""
    full = {
        name: part[0] if len(part) == 1 else torch.empty_like(part[0])
        for name, part in parts.items()
    }
    some = {name: part for name, part in parts.items() if part.numel() > 0}
    any_part = next(iter(some.values()))
    _add_splits(call, tuple(some))(
        ss_parts_ptr=some.get("ss", any_part), tt_parts_ptr=some.get("tt", any_part),
        ts_parts_ptr=some.get("ts", any_part), ss_ptr=full.get("ss", any_part),
        tt_ptr=full.get("tt", any_part), ts_ptr=full.get("ts", any_part),
    )  # fmt: skip
    return full
