# SPDX-License-Identifier: Apache-2.0
"""What is special about rkd: published values, what does not change it, close and equal rows,
memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, Case, assert_within_budget
from labelled import info_of
from torch import Tensor
from values import STUDENT, assert_same
from values import WIDE_TEACHER as TEACHER

from kdkernels import _dispatch
from kdkernels.testing import numerics, peak
from kdkernels.testing.opinfo import Sample, randn
from kdkernels.testing.opinfos.rkd import eager_angle, eager_distance

NAMES = ("rkd_distance", "rkd_angle")
DISTANCE = NAMES[:1]
FLOAT64 = torch.float64


def _case(name: str, backend: str, *args: Tensor) -> Case:
    sample = Sample("here", args)
    return Case(info_of(name), backend, args[0].device, args[0].dtype, sample)


def each_backend(
    dtype: torch.dtype = torch.float64,
    names: tuple[str, ...] = NAMES,
    backends: tuple[str, ...] = _dispatch.BACKENDS,
) -> pytest.MarkDecorator:
    params = []
    for name in names:
        for device in DEVICES:
            for backend in backends:
                case = _case(name, backend, *(torch.ones(3, 2, device=device, dtype=dtype),) * 2)
                marks = [pytest.mark.gpu] if device.type == "cuda" else []
                if case.why_not() is None:
                    params.append(pytest.param(case, id=f"{name}-{backend}", marks=marks))
    return pytest.mark.parametrize("case", params)


def on(case: Case, *args: Tensor) -> Case:
    return case.having(*(arg.to(case.device, case.dtype) for arg in args))


def loss_and_gradients(case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    args = [arg.clone().requires_grad_() for arg in case.sample.args]
    loss = case.call(*args)
    return loss.detach(), torch.autograd.grad(loss, args)


@each_backend(names=DISTANCE)
def test_distance_has_the_published_value(case: Case) -> None:
    loss, (gradient, _) = loss_and_gradients(on(case, STUDENT, TEACHER))
    # given to twelve digits
    assert f"{loss.item():.12f}" == "0.055708203530"
    assert f"{gradient.norm().item():.12f}" == "0.027520851923"


@each_backend(torch.float32, names=DISTANCE)
def test_distance_has_the_published_value_in_fp32(case: Case) -> None:
    rows = on(case, STUDENT, TEACHER)
    assert_within_budget(rows, rows.errors())


@each_backend()
def test_eager_baselines_compute_the_same(case: Case) -> None:
    eager = eager_distance if case.info.name == "rkd_distance" else eager_angle
    rows = on(case, STUDENT, TEACHER)
    loss, (gradient, _) = loss_and_gradients(rows)
    student = rows.sample.args[0].clone().requires_grad_()
    wanted = eager(student, rows.sample.args[1])
    (wanted_gradient,) = torch.autograd.grad(wanted, student)
    assert_same(loss, wanted.detach())
    assert_same(gradient, wanted_gradient)


@each_backend()
def test_motions_and_scale_change_nothing(case: Case) -> None:
    rotation = torch.linalg.qr(randn(16, 16, seed=5, device=torch.device("cpu"), dtype=FLOAT64))[0]
    moved = 7 * STUDENT @ rotation + torch.arange(16)
    loss, (gradient, _) = loss_and_gradients(on(case, STUDENT, TEACHER))
    other, (other_gradient, _) = loss_and_gradients(on(case, moved, TEACHER))
    assert_same(other, loss)
    assert_same(7 * other_gradient @ rotation.mT.to(other_gradient), gradient)
    # what a motion or a scale would move is not in the gradient
    x = on(case, STUDENT, TEACHER).sample.args[0]
    size = gradient.abs().max()
    for product in (gradient.sum(0), (gradient * x).sum()):
        assert_same(product, 0 * product, size=size)


# Triton's tiles are small in the interpreter: every test has several of them.
@each_backend(backends=("cpu", "cuda", "reference"))
def test_several_tiles_of_all_kinds(case: Case) -> None:
    """More rows than a tile has, and a last tile that is not full."""
    device = torch.device("cpu")
    s, t = (randn(150, D, seed=D, device=device, dtype=FLOAT64) for D in (12, 5))
    rows = on(case, s, t)
    assert_within_budget(rows, rows.errors())


def clusters(B: int, D: int, spread: float, centres: int) -> Tensor:
    """Rows of norm 10 or so, `spread` apart in each of so many places."""
    device = torch.device("cpu")
    at = 10 * F.normalize(randn(centres, D, seed=1, device=device, dtype=FLOAT64), dim=1)
    return at[torch.arange(B) % centres] + spread * randn(
        B, D, seed=2, device=device, dtype=FLOAT64
    )


@pytest.mark.parametrize("centres", [1, 5])
@each_backend(torch.float32)
def test_clusters_keep_their_digits(case: Case, centres: int) -> None:
    """The angles at a row between one near and one far are differences of large numbers."""
    B = 15 if case.backend == "triton" else 90
    teacher = randn(B, 7, seed=3, device=torch.device("cpu"), dtype=FLOAT64)
    rows = on(case, clusters(B, 16, 1e-3, centres), teacher)
    assert_within_budget(rows, rows.errors())


@each_backend()
def test_equal_rows(case: Case) -> None:
    one = torch.ones(6, 5)
    for student, teacher in ((one, one), (one, 0 * one)):
        loss, gradients = loss_and_gradients(on(case, student, teacher))
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients)
    # of the student only: nothing to be told from nothing, and no gradient to say where
    rows = on(case, one, TEACHER[:6])
    loss, (gradient, of_teacher) = loss_and_gradients(rows)
    assert_same(loss, case.info.define(rows.sample))
    assert loss > 0
    assert not gradient.any()
    assert of_teacher.isfinite().all()


@each_backend()
def test_few_rows(case: Case) -> None:
    for B in (0, 1, 2):
        rows = on(case, STUDENT[:B], TEACHER[:B])
        loss, gradients = loss_and_gradients(rows)
        # two rows are at the mean distance, and there is one angle of three rows, between equals
        assert loss.abs() <= numerics.FP64_RELATIVE**2
        assert all(gradient.isfinite().all() for gradient in gradients)


@each_backend()
def test_equal_sides_cost_nothing(case: Case) -> None:
    loss, gradients = loss_and_gradients(on(case, STUDENT, STUDENT.clone()))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.skipif(
    peak.why_not(torch.device("cpu")) is not None, reason="peak memory cannot be measured"
)
@pytest.mark.parametrize(
    ("name", "B", "matrices"), [("rkd_distance", 3000, 0.9), ("rkd_angle", 700, 20.0)]
)
def test_extra_memory(name: str, B: int, matrices: float) -> None:
    """Distances of narrow features are no B x B matrix; angles are a few, in fp64."""
    info, cpu = info_of(name), torch.device("cpu")
    if _dispatch.why_not("rkd", "cpu", (torch.ones(2, 2), torch.ones(2, 2))) is not None:
        pytest.skip("the C++ library is not built")
    shape = dataclasses.replace(info.bench[0], sizes={"B": B, "D": 16})
    used = peak.extra_mib(name, shape, torch.float32, "fwd_bwd", "cpu", cpu)
    assert used < matrices * B * B * 4 / peak.MIB
