# SPDX-License-Identifier: Apache-2.0
"""The error budget, in one place (docs/numerics.md has the argument).

`hi` is the definition in fp64, `low` the definition in the dtype under test, `out` the result under
test:

    max|out - hi| <= 2 (max|low - hi| + eps(dtype) scale)

where scale is max|hi|, or the size of the cancelling numbers for a sample that says so. fp64
results are held to 1e-10 of the scale instead, since `hi` has no more digits than they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels.testing.opinfo import OpInfo, Sample

FACTOR = 2.0
FP64_RELATIVE = 1e-10
# Two ways to the same fp64 number agree within this, since each of them keeps FP64_RELATIVE of it.
FP64_AGREEMENT = 2 * FP64_RELATIVE
# A row whose true gradient is above this share of the largest must not come back more than this
# much smaller.
ROW_SHARE, ROW_RATIO = 1e-2, 4.0


@dataclass(frozen=True)
class Error:
    """How far a result is from the truth, and how far it may be."""

    what: str  # "loss", or "d" and the argument's name
    error: float
    budget: float
    scale: float
    detail: str  # the worst element, for a person

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # False for NaN

    @property
    def relative(self) -> float:
        return self.error / self.scale if self.scale > 0 else self.error


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Floating tensors in `dtype`; everything else as it is."""
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def value_and_grads(
    call: Any, args: tuple[Any, ...], n_diff: int, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """The result of `call(*args)` and the gradients of its first `n_diff` floating-point arguments
    under a fixed random dout.
    """
    floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    places = floats[:n_diff]
    args = tuple(a.detach().requires_grad_() if i in places else a for i, a in enumerate(args))
    sources = [args[i] for i in places]
    value = call(*args)
    generator = torch.Generator().manual_seed(seed)
    dout = (
        torch.rand(value.shape, generator=generator, dtype=torch.float64)
        .add(0.5)
        .to(value.device, value.dtype)
    )
    grads = torch.autograd.grad(value, sources, dout) if value.numel() or sources else ()
    return value.detach(), list(grads)


def compare(
    what: str, out: Tensor, hi: Tensor, low: Tensor, dtype: torch.dtype, scale: float | None = None
) -> Error:
    """Judge one result against the budget. An unexpected non-finite element makes the error
    infinite.
    """
    out, hi, low = out.double(), hi.double(), low.double()
    if hi.numel() == 0:
        return Error(what, 0.0, 0.0, 0.0, "empty")
    if scale is None:
        scale = hi.abs().max().item()
    error = (out - hi).abs()
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    largest = error.nan_to_num(nan=torch.inf).flatten()[worst].item()
    low_error = (low - hi).abs().max().item()
    # where the definition itself overflows in this dtype, it excuses nothing
    if not low_error < torch.inf:
        low_error = 0.0
    if dtype == torch.float64:
        budget = FP64_RELATIVE * scale
    else:
        budget = FACTOR * (low_error + torch.finfo(dtype).eps * scale)
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), hi.shape)]
    detail = (
        f"{what}{index}: out {out.flatten()[worst].item():.9g}, "
        f"fp64 {hi.flatten()[worst].item():.9g}, "
        f"definition in {dtype} {low.flatten()[worst].item():.9g}; "
        f"error {largest:.3g}, budget {budget:.3g}"
    )
    return Error(what, largest, budget, scale, detail)


def largest(scale: float | Tensor | None) -> float | None:
    """Of a scale per row the one that all rows share."""
    if not isinstance(scale, Tensor):
        return scale
    return scale.max().item() if scale.numel() else 0.0


def missing_rows(out: Tensor, hi: Tensor) -> list[int]:
    """Rows of a gradient that are far smaller than they should be, which no absolute tolerance
    sees.
    """
    if hi.numel() == 0:
        return []
    size_out, size_hi = (
        torch.atleast_2d(g.double()).flatten(0, -2).norm(dim=-1) for g in (out, hi)
    )
    lost = (size_hi > ROW_SHARE * size_hi.max()) & (size_out * ROW_RATIO < size_hi)
    return lost.nonzero().flatten().tolist()


def check_sample(
    info: OpInfo,
    sample: Sample,
    dtype: torch.dtype,
    backend: str,
    rows: Tensor | None = None,  # [rows of every gradient] bool
) -> list[Error]:
    """Loss and every gradient of one sample on one backend, each against its budget. Of gradients
    only `rows` are compared, if given."""
    n = len(info.diff_args)
    hi, hi_grads = value_and_grads(
        lambda *a: info.define(sample, a), cast(sample.args, torch.float64), n
    )
    low, low_grads = value_and_grads(lambda *a: info.define(sample, a), sample.args, n)
    out, grads = value_and_grads(
        lambda *a: info.function(*a, **sample.kwargs, backend=backend), sample.args, n
    )
    if rows is not None:
        hi_grads, low_grads, grads = ([g[rows] for g in of] for of in (hi_grads, low_grads, grads))
    names = tuple(info.places(sample.args))
    loss_scale, grad_scales = None, (None,) * len(names)
    if (sample.cancels or info.subtracts) and info.magnitude is not None:
        loss_scale, grad_scales = info.magnitude(sample)
    errors = [compare("loss", out, hi, low, dtype, loss_scale)]
    for name, g, g_hi, g_low, scale in zip(
        names, grads, hi_grads, low_grads, grad_scales, strict=True
    ):
        result = compare(f"d{name}", g, g_hi, g_low, dtype, largest(scale))
        lost = [] if sample.cancels else missing_rows(g, g_hi)
        if lost:
            result = Error(
                result.what,
                torch.inf,
                result.budget,
                result.scale,
                f"d{name}: rows {lost[:8]} vanish",
            )
        errors.append(result)
    return errors
