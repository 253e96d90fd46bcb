# SPDX-License-Identifier: Apache-2.0
"""pairwise: similarities or distances of all pairs of rows.

Traffic in elements: forward reads the rows once per tile, writes N M; backward reads the incoming
gradient, and of distances the values, N M each, and writes the gradients of the rows. Of a batch
with itself half of the products. Derivation: docs/ops/pairwise.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, TensorForm, explained_by, form, requested_backend
from kdkernels._function import KernelFunction, keep_for_backward
from kdkernels._library import define_operator, first_order

PRODUCTS = ("dot", "cosine")  # metrics whose gradient does not need their value
METRICS = (*PRODUCTS, "euclidean", "sqeuclidean", "rbf")

# Operators take [N, D] or [G, N, D]; y is None where it is x. The result of the forward, the same
# for every backend:
#   out  [N, M] or [G, N, M]  in the dtype of x. Also the only residual, of distances only: None for
#                             a product. Without y it is symmetric to the last bit, and its diagonal
#                             of distances exactly 0 (rbf: 1).
# The backward without y returns the gradient through both sides, and never a dy.


def _fwd_fake(x: Tensor, y: Tensor | None, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], (x if y is None else y).shape[-2]))


def _bwd_fake(
    dout: Tensor, x: Tensor, y: Tensor | None, out: Tensor | None, metric: str, gamma: float,
    need_x: bool, need_y: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(y.shape if need_y else (0,))


_fwd = define_operator(
    "pairwise",
    "fwd",
    "(Tensor x, Tensor? y, str metric, float gamma, str backend) -> Tensor out",
    _fwd_fake,
)
_bwd = define_operator(
    "pairwise",
    "bwd",
    "(Tensor dout, Tensor x, Tensor? y, Tensor? out, str metric, float gamma, bool need_x, "
    "bool need_y, str backend) -> (Tensor dx, Tensor dy)",
    _bwd_fake,
)


class PairwiseFunction(KernelFunction):
    """Attaches the operator pair to autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, metric: str, gamma: float, backend: str
    ) -> Tensor:
        out = _fwd(x, y, metric, gamma, backend)
        keep_for_backward(ctx, x, y, None if metric in PRODUCTS else out)
        ctx.options = metric, gamma, backend
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, kept: tuple[Tensor | None, ...], dout: Tensor) -> tuple[Any, ...]:
        metric, gamma, backend = ctx.options
        need_x, need_y = ctx.needs_input_grad[:2]
        dx, dy = _bwd(dout, *kept, metric, gamma, need_x, need_y, backend)
        return dx if need_x else None, dy if need_y else None, None, None, None


def _check(x: Tensor, y: Tensor | None, metric: str, gamma: float) -> tuple[torch.dtype, float]:
    """The dtype of both sides, and gamma as the operators take it."""
    _checks.features("x", x)
    dtype = x.dtype
    if y is not None and y is not x:
        _checks.features("y", y)
        _checks.same_device("y", y, "x", x)
        _checks.same_groups("y", y, "x", x)
        _checks.same_columns("y", y, "x", x)
        dtype = _checks.common_dtype(dtype, y.dtype)
    _checks.choice("metric", metric, METRICS)
    return dtype, _checks.positive("gamma", gamma)


def _grouped(x: Tensor) -> Tensor:
    """[..., N, D] -> [G, N, D]; a matrix stays one."""
    return x.flatten(0, -3) if x.dim() > 3 else x


def _operator_args(x: Tensor, y: Tensor | None, metric: str, gamma: float) -> tuple[Any, ...]:
    dtype, gamma = _check(x, y, metric, gamma)

    def grouped(side: Tensor) -> TensorForm:
        shape = side.shape
        if len(shape) > 3:
            shape = (shape[:-2].numel(), *shape[-2:])
        return form(side, dtype=dtype, shape=shape)

    return grouped(x), None if y is None or y is x else grouped(y), metric, gamma


def _choices(x: Tensor, y: Tensor | None, **_: Any) -> dict[str, str]:
    return {"products": "half, by symmetry" if y is None or y is x else "all"}


@explained_by(_operator_args, _choices)
def pairwise(
    x: Tensor,  # [..., N, D]
    y: Tensor | None = None,  # [..., M, D]
    *,
    metric: Literal["dot", "cosine", "euclidean", "sqeuclidean", "rbf"] = "cosine",
    gamma: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    r"""Similarity or distance of each row of x with each row of y.

    | metric | value |
    |---|---|
    | `dot` | <x, y> |
    | `cosine` | <x, y> / (max(|x|, 1e-12) max(|y|, 1e-12)) |
    | `euclidean` | |x - y| |
    | `sqeuclidean` | |x - y|^2 |
    | `rbf` | exp(-gamma |x - y|^2) |

    Distances keep their digits where rows are close and far from 0: they are taken from differences
    there. Between coincident rows the gradient of `euclidean` is 0.

    Args:
        x, y: [..., N, D] and [..., M, D], fp16, bf16, fp32 or fp64, with the same leading
            dimensions; the wider dtype is taken where they differ. Without y (or with y = x, the
            same tensor) the rows of x are compared with each other: half of the work, an exactly
            symmetric result, exact zeros on the diagonal of distances.
        metric: One of the table.
        gamma: Of `rbf`; positive, finite.
        backend: See `kdkernels.explain`.

    Returns:
        [..., N, M] in the dtype of x and y, as `torch.cdist` and `torch.matmul` return it; sums are
        in fp32 (fp64 for fp64). Distances to and from a row with a squared norm that is not below a
        quarter of the largest number of that accumulation, infinity and NaN included, are NaN.

    Raises:
        TypeError, ValueError: an argument does not fit, by name.
        BackendUnavailableError: `backend` cannot run this call, with the reason.
    """
    dtype, gamma = _check(x, y, metric, gamma)
    if y is None or y is x:
        a, b = _grouped(x), None
    else:
        a, b = map(_grouped, _checks.in_dtype(dtype, x, y))
    out = PairwiseFunction.apply(a, b, metric, gamma, requested_backend(backend))
    return out if x.dim() <= 3 else out.reshape((*x.shape[:-1], out.shape[-1]))
