# SPDX-License-Identifier: Apache-2.0
"""pairwise on Triton: the operator pair.

Features are fp16, bf16 or fp32; everything accumulates in fp32. The backward makes its weights tile
by tile, once for each block of columns of the rows. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.centre import Rows, centred
from kdkernels.triton.common.distances import DISTANCES
from kdkernels.triton.common.launch import arch_of, cdiv, on_device, supports
from kdkernels.triton.common.norms import EPS, normalise_gradient
from kdkernels.triton.pairwise import kernels
from kdkernels.triton.pairwise.config import PairwiseConfig, pick_config

__all__ = ["pairwise_bwd", "pairwise_fwd", "supports"]

_METRICS = {**DISTANCES, "dot": kernels.DOT.value, "rbf": kernels.RBF.value}
_PRODUCTS = ("dot", "cosine")


def pairwise_fwd(
    x: Tensor,  # [N, D] or [G, N, D]
    y: Tensor | None,  # [M, D] or [G, M, D]
    metric: str,
    gamma: float,
) -> Tensor:
    rows, others = _groups(x), None if y is None else _groups(y)
    (G, N, D), M = rows.shape, (rows if others is None else others).shape[1]
    out = x.new_empty((*x.shape[:-1], M))
    if out.numel() > 0:
        with on_device(x):
            config = _config(x, metric)
            tile = config.values
            n_m, n_n = cdiv(N, tile.m), cdiv(M, tile.n)
            tiles = n_m * (n_m + 1) // 2 if others is None else n_m * n_n
            a, b = _sides(rows, others, metric)
            kernels._pairwise_fwd_kernel[(G * tiles,)](
                x_ptr=a.x, y_ptr=b.x, given_x_ptr=a.given, given_y_ptr=b.given, x_norm_ptr=a.norm,
                y_norm_ptr=b.norm, out_ptr=out, N=N, M=M, D=D, gamma=gamma,
                IN_BATCH=others is None, METRIC=_METRICS[metric], PRODUCT=metric in _PRODUCTS,
                PRECISION=config.value_precision, **tile.launch(),
            )  # fmt: skip
    return out


def pairwise_bwd(
    dout: Tensor,  # [N, M] or [G, N, M]
    x: Tensor,
    y: Tensor | None,
    out: Tensor | None,  # of distances
    metric: str,
    gamma: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    rows, others = _groups(x), None if y is None else _groups(y)
    d = dout[None] if dout.dim() == 2 else dout
    values = d if out is None else _groups(out)  # of products a pointer that no kernel follows
    dx, dy = x.new_empty(0), x.new_empty(0)
    with on_device(x):
        options = _config(x, metric), metric, gamma, y is None
        a, b = _sides(rows, others, metric)
        if need_x:
            dx = _gradient(d, values, a, b, *options).reshape(x.shape)
        if need_y:
            dy = _gradient(d.mT, values.mT, b, a, *options).reshape(y.shape)
    return dx, dy


def _gradient(
    dout: Tensor,  # [G, N, M], any strides
    values: Tensor,  # [G, N, M], any strides but that of the groups
    side: Rows,  # [G, N, D]
    other: Rows,  # [G, M, D]
    config: PairwiseConfig,
    metric: str,
    gamma: float,
    in_batch: bool,
) -> Tensor:  # [G, N, D]
    x = side.given
    (G, N, D), M, tile = x.shape, other.x.shape[1], config.gradient
    if x.numel() == 0 or M == 0:
        return torch.zeros_like(x)
    tiles = G * tile.count(N, D)
    length, splits = tile.split(M, tiles, config.arch)
    parts = x.new_empty((splits, G, N, D), dtype=torch.float32)
    kernels._pairwise_bwd_kernel[(tiles, splits)](
        dout_ptr=dout, out_ptr=values, x_ptr=side.x, y_ptr=other.x, given_x_ptr=x,
        given_y_ptr=other.given, x_norm_ptr=side.norm, y_norm_ptr=other.norm, dx_ptr=parts, G=G,
        N=N, M=M, D=D, gamma=gamma, split_length=length,
        stride_dg=dout.stride(0) if G > 1 else 0, stride_dn=dout.stride(1),
        stride_dm=dout.stride(2),
        stride_on=values.stride(1), stride_om=values.stride(2), IN_BATCH=in_batch,
        METRIC=_METRICS[metric], PRODUCT=metric in _PRODUCTS,
        PRECISION=config.gradient_precision, **tile.launch(),
    )  # fmt: skip
    dx = parts[0] if splits == 1 else parts.sum(0)
    return normalise_gradient(x, dx) if metric == "cosine" else dx.to(x.dtype)


def _groups(x: Tensor) -> Tensor:
    """[N, D] or [G, N, D] as a contiguous [G, N, D]."""
    return (x[None] if x.dim() == 2 else x).contiguous()


def _sides(x: Tensor, y: Tensor | None, metric: str) -> tuple[Rows, Rows]:
    """Rows and numbers of both sides: squared norms for distances, 1 / max(norm, eps) for cosines,
    each rounded once."""
    if metric not in _PRODUCTS:
        return centred(x, y)
    sides = [_unmoved(side, metric) for side in ((x,) if y is None else (x, y))]
    return sides[0], sides[-1]


def _unmoved(x: Tensor, metric: str) -> Rows:
    if metric == "dot":
        return Rows(x, x, x)  # for the norms a pointer that no kernel follows
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return Rows(x, x, (1 / norm.clamp_min(EPS.value)).float())


def _config(x: Tensor, metric: str) -> PairwiseConfig:
    return pick_config(
        x.shape[-1],
        metric_is_distance=metric not in _PRODUCTS,
        dtype=x.dtype,
        arch=arch_of(x),
        fp32_matmul=fp32_matmul(),
    )
