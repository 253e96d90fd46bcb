# SPDX-License-Identifier: Apache-2.0
"""pairwise on Triton: the operator pair.

Features are fp16, bf16 or fp32; everything accumulates in fp32. The backward makes its weights tile
by tile, once for each block of columns of the rows. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels.triton.common.distances import DISTANCES
from kdkernels.triton.common.launch import arch_of, cdiv, on_device, supports
from kdkernels.triton.common.norms import EPS, normalise_gradient, squared_norms
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
            norms = _norms(rows, metric)
            kernels._pairwise_fwd_kernel[(G * tiles,)](
                x_ptr=rows, y_ptr=rows if others is None else others, x_norm_ptr=norms,
                y_norm_ptr=norms if others is None else _norms(others, metric), out_ptr=out,
                N=N, M=M, D=D, gamma=gamma, IN_BATCH=others is None, METRIC=_METRICS[metric],
                PRODUCT=metric in _PRODUCTS, PRECISION=config.value_precision, **tile.launch(),
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
    rows = _groups(x)
    others = rows if y is None else _groups(y)
    d = dout[None] if dout.dim() == 2 else dout
    values = d if out is None else _groups(out)  # of products a pointer that no kernel follows
    dx, dy = x.new_empty(0), x.new_empty(0)
    with on_device(x):
        config, norms = _config(x, metric), _norms(rows, metric)
        other_norms = norms if y is None else _norms(others, metric)
        options = config, metric, gamma, y is None
        if need_x:
            sides = (rows, norms), (others, other_norms)
            dx = _gradient(d, values, *sides, *options).reshape(x.shape)
        if need_y:
            sides = (others, other_norms), (rows, norms)
            dy = _gradient(d.mT, values.mT, *sides, *options).reshape(y.shape)
    return dx, dy


def _gradient(
    dout: Tensor,  # [G, N, M], any strides
    values: Tensor,  # [G, N, M], any strides but that of the groups
    side: tuple[Tensor, Tensor],  # [G, N, D] and its norms
    other: tuple[Tensor, Tensor],  # [G, M, D] and its norms
    config: PairwiseConfig,
    metric: str,
    gamma: float,
    in_batch: bool,
) -> Tensor:  # [G, N, D]
    (x, x_norm), (y, y_norm) = side, other
    (G, N, D), M, tile = x.shape, y.shape[1], config.gradient
    if x.numel() == 0 or M == 0:
        return torch.zeros_like(x)
    tiles = G * tile.count(N, D)
    length, splits = tile.split(M, tiles, config.arch)
    parts = x.new_empty((splits, G, N, D), dtype=torch.float32)
    kernels._pairwise_bwd_kernel[(tiles, splits)](
        dout_ptr=dout, out_ptr=values, x_ptr=x, y_ptr=y, x_norm_ptr=x_norm, y_norm_ptr=y_norm,
        dx_ptr=parts, G=G, N=N, M=M, D=D, gamma=gamma, split_length=length,
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


def _norms(x: Tensor, metric: str) -> Tensor:  # [G, N] fp32
    """Squared norms for distances, 1 / max(norm, eps) for cosines, each rounded once."""
    if metric == "dot":
        return x  # a pointer that no kernel follows
    if metric != "cosine":
        return squared_norms(x)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return (1 / norm.clamp_min(EPS.value)).float()


def _config(x: Tensor, metric: str) -> PairwiseConfig:
    return pick_config(
        x.shape[-1],
        metric_is_distance=metric not in _PRODUCTS,
        dtype=x.dtype,
        arch=arch_of(x),
        fp32_matmul=fp32_matmul(),
    )
