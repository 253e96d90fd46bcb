# SPDX-License-Identifier: Apache-2.0
"""What is special about pkt: the published code, its degenerate rows, invariances, memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import Calls
from torch import Tensor
from values import STUDENT, assert_same, waves
from values import WIDE_TEACHER as TEACHER

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels.reference import _pkt as reference
from kdkernels.testing import numerics, peak
from kdkernels.testing.opinfo import BenchShape, randn

CPU = torch.device("cpu")
FORMS = tuple(itertools.product(("cosine", "student_t"), ("kl", "jeffreys")))
each_form = pytest.mark.parametrize(("kernel", "divergence"), FORMS)


def backends(*tensors: Tensor, **options: str) -> list[str]:
    """Those that can run here."""
    args = (*tensors, options.get("kernel", "cosine"), options.get("divergence", "kl"), True)
    found = [b for b in _dispatch.BACKENDS if _dispatch.why_not("pkt", b, args) is None]
    assert "reference" in found
    return found


def value_and_gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = kd.pkt(student, teacher, **options)
    return value.detach(), torch.autograd.grad(value, student)[0]


def similarity(x: Tensor, y: Tensor, kernel: str, divergence: str) -> Tensor:
    if kernel == "student_t":
        return 1 / (1 + ((x - y).square().sum() + 1e-6).sqrt())
    eps = 1e-7 if divergence == "kl" else 1e-6
    x, y = (v / (v.square().sum().sqrt() + eps) for v in (x, y))
    return (torch.dot(x, y) + 1) / 2


def transcribed(student: Tensor, teacher: Tensor, kernel: str, divergence: str) -> Tensor:
    """Entry by entry, with plain loops."""
    total = torch.zeros((), dtype=torch.float64)
    B = len(student)
    for i in range(B):
        rows = []
        for x in (student, teacher):
            k = torch.stack([similarity(x[i], x[j], kernel, divergence) for j in range(B)])
            rows.append(k / k.sum())
        p, q = rows
        if divergence == "kl":
            total = total + (q * torch.log((q + 1e-7) / (p + 1e-7))).sum()
        else:
            total = total + ((q - p) * (q.log() - p.log())).sum()
    return total / B**2


@each_form
def test_every_backend_computes_what_is_published(kernel: str, divergence: str) -> None:
    student = STUDENT.clone().requires_grad_()
    expected = transcribed(student, TEACHER, kernel, divergence)
    (gradient,) = torch.autograd.grad(expected, student)
    for backend in backends(STUDENT, TEACHER):
        found = value_and_gradient(
            STUDENT, TEACHER, kernel=kernel, divergence=divergence, backend=backend
        )
        assert_same(found[0], expected.detach())
        assert_same(found[1], gradient)


@each_form
def test_agreement_costs_nothing(kernel: str, divergence: str) -> None:
    for backend in backends(STUDENT, STUDENT):
        value, gradient = value_and_gradient(
            STUDENT, STUDENT.clone(), kernel=kernel, divergence=divergence, backend=backend
        )
        assert_same(value, torch.zeros_like(value), size=1.0)
        scale = transcribed(STUDENT, TEACHER, kernel, divergence)
        assert gradient.abs().max() < scale  # "kl" has its minimum, up to eps, elsewhere
        if divergence == "jeffreys":
            assert_same(gradient, torch.zeros_like(gradient), size=1.0)


@pytest.mark.parametrize("kernel", ["cosine", "student_t"])
def test_jeffreys_is_symmetric(kernel: str) -> None:
    options = {"kernel": kernel, "divergence": "jeffreys"}
    for backend in backends(STUDENT, TEACHER):
        one = kd.pkt(STUDENT, TEACHER, **options, backend=backend)
        other = kd.pkt(TEACHER, STUDENT, **options, backend=backend)
        assert_same(one, other)


@each_form
def test_rotations_and_permutations_change_nothing(kernel: str, divergence: str) -> None:
    options = {"kernel": kernel, "divergence": divergence}
    rotation, _ = torch.linalg.qr(waves(16, 16, 1.3, 0.7, 0.2))
    order = torch.randperm(8)
    for backend in backends(STUDENT, TEACHER):
        plain = kd.pkt(STUDENT, TEACHER, **options, backend=backend)
        rotated = kd.pkt(STUDENT @ rotation, TEACHER, **options, backend=backend)
        permuted = kd.pkt(STUDENT[order], TEACHER[order], **options, backend=backend)
        assert_same(rotated, plain)
        assert_same(permuted, plain)


def test_distances_do_not_depend_on_where_the_rows_are() -> None:
    """Which products of rows far from the origin would lose."""
    s, t = (randn(35, 6, seed=seed, device=CPU, dtype=torch.float32) for seed in (1, 2))
    for divergence in ("kl", "jeffreys"):
        options = {"kernel": "student_t", "divergence": divergence}
        for backend in ("cpu", "triton"):
            if backend not in backends(s, t, **options):
                continue
            near = value_and_gradient(s, t, **options, backend=backend)
            far = value_and_gradient(s + 64, t, **options, backend=backend)
            hi = value_and_gradient((s + 64).double(), t.double(), **options)
            low = value_and_gradient(s + 64, t, **options, backend="reference")
            for what, *results in zip(("loss", "dstudent"), far, hi, low, strict=True):
                scale = max(abs(reference.pkt(s, t * 0, **options).item()), 1.0 / len(s))
                error = numerics.compare(what, *results, torch.float32, scale)
                assert error.ok, error.detail
            assert torch.isfinite(near[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_form
def test_degenerate_rows(kernel: str, divergence: str, dtype: torch.dtype) -> None:
    options = {"kernel": kernel, "divergence": divergence}
    teacher = TEACHER.to(dtype)
    cases = {
        "zero row": torch.cat([torch.zeros(1, 16), STUDENT[1:]]).to(dtype),
        "all zero": torch.zeros(8, 16, dtype=dtype),
        "all equal": STUDENT[:1].expand(8, -1).to(dtype),
        "apart": torch.cat([STUDENT[:4], -STUDENT[:4]]).to(dtype) * 100,
    }
    for name, student in cases.items():
        for backend in backends(student, teacher):
            value, gradient = value_and_gradient(student, teacher, **options, backend=backend)
            assert torch.isfinite(value), (name, backend)
            assert torch.isfinite(gradient).all(), (name, backend)
            if name in ("all zero", "all equal"):
                uniform = reference.pkt(student.double() * 0, TEACHER, **options)
                error = numerics.compare(
                    "loss", value, uniform, uniform.to(dtype), dtype, 1.0 / len(student)
                )
                assert error.ok, error.detail


def test_a_zero_row_has_the_gradient_that_differences_show() -> None:
    student = STUDENT.clone()
    student[2] = 0
    step = torch.zeros_like(student)
    step[2, 3] = 1e-13
    difference = reference.pkt(student + step, TEACHER) - reference.pkt(student - step, TEACHER)
    slope = difference / (2 * step[2, 3])
    for backend in backends(student, TEACHER):
        _, gradient = value_and_gradient(student, TEACHER, backend=backend)
        assert torch.sign(gradient[2, 3]) == torch.sign(slope)
        assert 0.9 < gradient[2, 3] / slope < 1.1


def test_no_gradient_is_computed_where_none_is_asked_for() -> None:
    for student in (STUDENT, STUDENT.clone().requires_grad_()):
        with Calls() as calls, torch.no_grad():
            kd.pkt(student, TEACHER)
        ((_, args, results),) = calls.made
        assert args[-2] is False
        assert results[1].numel() == 0
    assert "none computed" in str(kd.explain("pkt", STUDENT, TEACHER))


def test_memory_holds_no_matrix_of_pairs() -> None:
    reason = peak.why_not(CPU)
    assert reason is None, reason
    shape = BenchShape("", {"B": 4096, "D": 32}, "")
    extra = peak.extra_mib("pkt", shape, torch.float32, "fwd_bwd", "cpu", CPU)
    assert extra < 4096**2 * 4 / peak.MIB / 2
