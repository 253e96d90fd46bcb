# SPDX-License-Identifier: Apache-2.0
"""What is special about correlation: the published code, what does not vary, invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Calls
from torch import Tensor
from values import assert_same

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels.testing import numerics
from kdkernels.testing.opinfo import Sample, opinfos, randn

CPU = torch.device("cpu")
DIST = {"temperature": 4.0, "row_weight": 0.5, "column_weight": 2.0}
R2KD = {"temperature": 4.0, "centered": False}


def logits(B: int, C: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(B, C, seed=seed, device=CPU, dtype=dtype) * 2


def backends(student: Tensor, teacher: Tensor) -> list[str]:
    """Those that can run here."""
    args = (student, teacher, 1.0, 1.0, 1.0, True, 1e-8, True)
    found = [b for b in _dispatch.BACKENDS if _dispatch.why_not("correlation", b, args) is None]
    assert "reference" in found
    return found


def value_and_gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = kd.correlation(student, teacher, **options)
    return value.detach(), torch.autograd.grad(value, student)[0]


def rho(a: Tensor, b: Tensor, centered: bool) -> Tensor:
    if centered:
        a, b = a - a.mean(), b - b.mean()
    product = a.square().sum().sqrt() * b.square().sum().sqrt()
    inner = (a * b).sum()
    return (inner if centered else inner.abs()) / (product + 1e-8)


def transcribed(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    row_weight: float = 1.0,
    column_weight: float = 1.0,
    centered: bool = True,
) -> Tensor:
    """Row by row and column by column, the uncentred form with its absolute value."""
    y, t = ((x / temperature).exp() for x in (student, teacher))
    y, t = (x / x.sum(1, keepdim=True) for x in (y, t))
    rows = torch.stack([1 - rho(a, b, centered) for a, b in zip(y, t, strict=True)])
    columns = torch.stack([1 - rho(a, b, centered) for a, b in zip(y.T, t.T, strict=True)])
    return temperature**2 * (row_weight * rows.mean() + column_weight * columns.mean())


@pytest.mark.parametrize("options", [{}, DIST, R2KD], ids=["defaults", "dist", "r2kd"])
def test_every_backend_computes_what_is_published(options: dict[str, Any]) -> None:
    student, teacher = logits(9, 7, 1).requires_grad_(), logits(9, 7, 2)
    expected = transcribed(student, teacher, **options)
    (gradient,) = torch.autograd.grad(expected, student)
    for backend in backends(student, teacher):
        value, found = value_and_gradient(student, teacher, **options, backend=backend)
        assert_same(value, expected.detach())
        assert_same(found, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centered", [True, False])
def test_agreement_costs_nothing(centered: bool, dtype: torch.dtype) -> None:
    x = logits(37, 11, 1, dtype)
    hi = transcribed(x.double(), x.double(), centered=centered)  # up to eps
    for backend in backends(x, x):
        value, gradient = value_and_gradient(x, x + 3, centered=centered, backend=backend)
        error = numerics.compare("loss", value, hi, hi.to(dtype), dtype, 2.0)
        assert error.ok, error.detail
        zero = torch.zeros_like(gradient)
        assert numerics.compare("dstudent", gradient, zero, zero, torch.float32, 1.0).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_that_do_not_vary_have_no_correlation(dtype: torch.dtype) -> None:
    """Exactly, or what rounding leaves would be divided by eps."""
    student, teacher = (logits(1, 13, seed, dtype).expand(70, -1) for seed in (1, 2))
    only_columns = {"row_weight": 0.0, "column_weight": 1.5, "temperature": 2.0}
    for backend in backends(student, teacher):
        value, gradient = value_and_gradient(student, teacher, **only_columns, backend=backend)
        assert value.item() == 1.5 * 2.0**2
        assert gradient.eq(0).all(), backend
        value, gradient = value_and_gradient(
            student[:1], teacher[:1], **only_columns, backend=backend
        )
        assert (value.item(), gradient.abs().max().item()) == (1.5 * 2.0**2, 0.0)


def test_rows_that_do_not_vary_have_no_correlation() -> None:
    for dtype in (torch.float32, torch.float64):
        student, teacher = torch.zeros(5, 13, dtype=dtype), torch.ones(5, 13, dtype=dtype)
        for backend in backends(student, teacher):
            value, gradient = value_and_gradient(
                student, teacher, column_weight=0.0, backend=backend
            )
            assert value.item() == 1
            assert gradient.eq(0).all()


def test_what_changes_no_correlation() -> None:
    student, teacher = logits(23, 11, 1), logits(23, 11, 2)
    rows, columns = torch.randperm(23), torch.randperm(11)
    for backend in backends(student, teacher):
        plain = kd.correlation(student, teacher, backend=backend)
        shifted = kd.correlation(student + logits(23, 1, 3), teacher, backend=backend)
        permuted = kd.correlation(
            student[rows][:, columns], teacher[rows][:, columns], backend=backend
        )
        swapped = kd.correlation(teacher, student, backend=backend)
        for other in (shifted, permuted, swapped):
            assert_same(other, plain)


def test_moments_keep_their_digits_where_columns_hardly_vary() -> None:
    """Columns whose deviations are a ten-thousandth of their means, over several pieces of rows."""
    ratio = 1e4
    student, teacher = (logits(700, 5, seed) / ratio + logits(1, 5, 9) for seed in (1, 2))
    options = {"row_weight": 0.0, "eps": 1e-30}
    expected = value_and_gradient(student, teacher, **options, backend="reference")
    for backend in backends(student, teacher):
        found = value_and_gradient(student, teacher, **options, backend=backend)
        for value, wanted in zip(found, expected, strict=True):
            assert_same(value, wanted, lost=ratio)


def test_a_class_that_is_ruled_out_has_probability_0() -> None:
    student, teacher = logits(9, 7, 1), logits(9, 7, 2)
    masked, far = student.clone(), student.clone()
    masked[2, 3], far[2, 3] = -torch.inf, -1e4
    for backend in backends(student, teacher):
        found = value_and_gradient(masked, teacher, backend=backend)
        wanted = value_and_gradient(far, teacher, backend=backend)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("remain", [slice(512, 515), slice(3), slice(699, None), slice(510, 514)])
def test_classes_are_ruled_out_in_whole_blocks_of_a_gpu(
    remain: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """700 classes are two blocks there; the interpreter's own are smaller."""
    pytest.importorskip("triton")
    from kdkernels.testing.aot.recorder import TARGETS
    from kdkernels.triton import correlation as triton

    by_gpu = triton.pick_config(3, 700, arch=TARGETS["sm_90"])
    assert by_gpu.by_row[1] == 512
    monkeypatch.setattr(triton, "pick_config", lambda B, C, arch: by_gpu)
    (info,) = (info for info in opinfos() if info.name == "correlation")
    ruled_out = torch.ones(700, dtype=torch.bool)
    ruled_out[remain] = False
    sides = (logits(3, 700, seed, torch.float32) for seed in (1, 2))
    args = tuple(x.masked_fill(ruled_out, -torch.inf) for x in sides)
    sample = Sample("ruled_out", args, cancels=True)
    for error in numerics.check_sample(info, sample, torch.float32, "triton"):
        assert error.ok, error.detail


def test_no_gradient_is_computed_where_none_is_asked_for() -> None:
    student, teacher = logits(5, 7, 1).requires_grad_(), logits(5, 7, 2)
    with Calls() as calls, torch.no_grad():
        kd.correlation(student, teacher)
    ((_, args, results),) = calls.made
    assert args[-2] is False
    assert results[1].numel() == 0
