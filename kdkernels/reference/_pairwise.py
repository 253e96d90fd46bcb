# SPDX-License-Identifier: Apache-2.0
"""Similarities and distances of all pairs of rows, in plain PyTorch.

`pairwise` is the definition; `pairwise_fwd` and `pairwise_bwd` are the operator pair.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdkernels.reference._definition import definition
from kdkernels.reference._distances import (
    distances,
    finite_pairs,
    gradients_of_pairs,
    wide,
)
from kdkernels.reference._rows import normalize_backward, norms, unit


@definition
def pairwise(
    x: Tensor,  # [..., N, D]
    y: Tensor | None = None,  # [..., M, D]
    *,
    metric: Literal["dot", "cosine", "euclidean", "sqeuclidean", "rbf"] = "cosine",
    gamma: float = 1.0,
) -> Tensor:  # [..., N, M]
    """The value of each row of x with each row of y (None: of x), differentiable by autograd.

    Distances to and from a row that is not finite are NaN.
    """
    y = x if y is None else y
    if metric == "cosine":
        x, y = unit(x), unit(y)
    if metric in ("dot", "cosine"):
        return x @ y.mT
    difference = x[..., :, None, :] - y[..., None, :, :]
    value = norms(difference) if metric == "euclidean" else difference.square().sum(-1)
    if metric == "rbf":
        value = torch.exp(-gamma * value)
    return torch.where(finite_pairs(x, y), value, torch.nan)


def pairwise_fwd(x: Tensor, y: Tensor | None, metric: str, gamma: float) -> Tensor:
    in_batch, dtype = y is None, x.dtype
    x = wide(x)
    y = x if in_batch else wide(y)
    if metric in ("dot", "cosine"):
        value = pairwise(x, y, metric=metric)
        if in_batch:  # a product of a matrix with itself need not be symmetric to the last bit
            value = value.triu() + value.triu(1).mT
    else:
        value = distances(x, y, "euclidean" if metric == "euclidean" else "sqeuclidean")
        value = torch.exp(-gamma * value) if metric == "rbf" else value
    return value.to(dtype)


def pairwise_bwd(
    dout: Tensor,  # [..., N, M]
    x: Tensor,  # [..., N, D]
    y: Tensor | None,  # [..., M, D]
    out: Tensor | None,  # [..., N, M], of distances
    metric: str,
    gamma: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    in_batch, dtype = y is None, x.dtype
    dout, x = wide(dout), wide(x)
    y = x if in_batch else wide(y)
    if in_batch:
        dout = dout + dout.mT
    if out is None:
        unit_x, unit_y = (unit(t) if metric == "cosine" else t for t in (x, y))
        dx, dy = dout @ unit_y, dout.mT @ unit_x
        if metric == "cosine":
            dx, dy = normalize_backward(x, dx), normalize_backward(y, dy)
    else:
        out = wide(out)
        weight = -gamma * out * dout if metric == "rbf" else dout
        distance = "euclidean" if metric == "euclidean" else "sqeuclidean"
        dx, dy = gradients_of_pairs(weight, out, x, y, distance)
    return (
        dx.to(dtype).contiguous() if need_x else x.new_empty(0, dtype=dtype),
        dy.to(dtype).contiguous() if need_y else x.new_empty(0, dtype=dtype),
    )
