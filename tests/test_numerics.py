# SPDX-License-Identifier: Apache-2.0
"""The budget itself: right results pass, planted faults do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SHORT, each_info, few, samples
from torch import Tensor

from kdkernels.testing import numerics
from kdkernels.testing.opinfo import OpInfo, Sample

CPU = torch.device("cpu")
FLOAT = torch.float32


def _sample(info: OpInfo, dtype: torch.dtype = FLOAT) -> Sample:
    return max(few(samples(info, CPU, dtype)), key=lambda sample: sample.args[0].shape[-2])


def _definition(info: OpInfo, sample: Sample) -> Callable[..., Tensor]:
    """The definition in the guise of a backend: it passes its own budget unless a fault is
    planted."""

    def call(*args: Any, backend: str, **kwargs: Any) -> Tensor:
        return info.define(dataclasses.replace(sample, kwargs=kwargs), args)

    return call


class _Planted(torch.autograd.Function):
    """Identity whose gradient passes through a fault."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.fault(grad.clone()), None


def _judge(
    info: OpInfo,
    sample: Sample,
    of_loss: Callable[[Tensor], Tensor] | None = None,
    of_grad: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, numerics.Error]:
    call = _definition(info, sample)

    def faulty(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        value = call(_Planted.apply(first, of_grad) if of_grad else first, *args, **kwargs)
        return of_loss(value) if of_loss else value

    judged = dataclasses.replace(info, function=faulty)
    return {
        error.what: error for error in numerics.check_sample(judged, sample, FLOAT, "reference")
    }


@each_info()
def test_the_definition_itself_passes(info: OpInfo) -> None:
    assert all(error.ok for error in _judge(info, _sample(info)).values())


def _zero_row(grad: Tensor) -> Tensor:
    # not the largest row: the loss of the largest would also break the maximum norm
    sizes = grad.flatten(0, -2).norm(dim=-1)
    row = int((sizes - sizes.median()).abs().argmin())
    grad.flatten(0, -2)[row] = 0
    return grad


def _nan(grad: Tensor) -> Tensor:
    grad[..., 0, 0] = torch.nan
    return grad


def _inf(grad: Tensor) -> Tensor:
    grad[..., -1, -1] = torch.inf
    return grad


@pytest.mark.parametrize(
    "fault", [_zero_row, _nan, _inf, torch.zeros_like, torch.neg, lambda grad: 2 * grad]
)
@each_info()
def test_a_faulty_gradient_fails(info: OpInfo, fault: Callable[[Tensor], Tensor]) -> None:
    errors = _judge(info, _sample(info), of_grad=fault)
    name = f"d{info.diff_args[0]}"
    assert not errors.pop(name).ok
    assert all(error.ok for error in errors.values())


@pytest.mark.parametrize(
    "fault", [lambda x: x * torch.nan, lambda x: x + torch.inf, lambda x: x * 0, lambda x: -x]
)
@each_info()
def test_a_faulty_loss_fails(info: OpInfo, fault: Callable[[Tensor], Tensor]) -> None:
    assert not _judge(info, _sample(info), of_loss=fault)["loss"].ok


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.values())
def test_an_error_of_four_eps_fails(dtype: torch.dtype) -> None:
    hi = torch.rand(5, 7, dtype=torch.float64) + 1
    scale = hi.max().item()
    eps = torch.finfo(dtype).eps
    exact = numerics.compare("x", hi, hi, hi, dtype)
    assert exact.ok
    assert exact.error == 0
    assert exact.scale == scale
    out = hi.clone()
    out[2, 3] += 4 * max(eps, numerics.FP64_RELATIVE if dtype == torch.float64 else 0) * scale
    error = numerics.compare("x", out, hi, hi, dtype)
    assert not error.ok
    assert "x[2, 3]" in error.detail


@pytest.mark.parametrize("dtype", [d for d in SHORT if d != torch.float64], ids=lambda d: SHORT[d])
def test_the_definitions_own_error_is_allowed_for(dtype: torch.dtype) -> None:
    hi = torch.rand(50, dtype=torch.float64) + 1
    low = hi * (1 + 8 * torch.finfo(dtype).eps)
    assert numerics.compare("x", low, hi, low, dtype).ok
    assert not numerics.compare("x", low, hi, hi, dtype).ok
    assert not numerics.compare("x", hi + 3 * (low - hi), hi, low, dtype).ok


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_definition_that_overflows_excuses_nothing(value: float) -> None:
    hi = torch.ones(3, dtype=torch.float64)
    low = torch.full_like(hi, value)
    assert numerics.compare("x", hi, hi, low, torch.float16).ok
    assert not numerics.compare("x", low, hi, low, torch.float16).ok
    assert not numerics.compare("x", 1.1 * hi, hi, low, torch.float16).ok


def test_a_declared_scale_replaces_the_largest_value() -> None:
    hi = torch.tensor([1e-9], dtype=torch.float64)
    out = hi + torch.finfo(FLOAT).eps
    assert not numerics.compare("x", out, hi, hi, FLOAT).ok
    assert numerics.compare("x", out, hi, hi, FLOAT, scale=1.0).ok


def test_an_expected_zero_is_exact() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    assert numerics.compare("x", zero, zero, zero, FLOAT).ok
    assert not numerics.compare("x", zero + 1e-30, zero, zero, FLOAT).ok


def test_missing_rows() -> None:
    hi = torch.rand(6, 4) + 1
    hi[5] *= 1e-6  # negligible beside the others
    out = hi.clone()
    assert numerics.missing_rows(out, hi) == []
    out[[1, 5]] = 0
    assert numerics.missing_rows(out, hi) == [1]
    assert numerics.missing_rows(hi[:0], hi[:0]) == []


@each_info()
def test_a_wrong_dtype_fails(info: OpInfo) -> None:
    """A loss that went through bf16 on its way is no fp32 loss, whatever dtype it says."""
    errors = _judge(info, _sample(info), of_loss=lambda x: (x * 1.001).bfloat16().to(x.dtype))
    assert not errors["loss"].ok
    rounded = _judge(info, _sample(info), of_grad=lambda grad: grad.bfloat16().to(grad.dtype))
    assert not rounded[f"d{info.diff_args[0]}"].ok
