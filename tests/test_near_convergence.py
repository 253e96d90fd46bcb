# SPDX-License-Identifier: Apache-2.0
"""gram_mse and relational_kl where the student is near its teacher, on features that share a mean:
nothing excuses an error that is small only beside what cancels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_gram_mse as gram
import test_relational_kl as kl
import torch
from cases import Case, assert_within_budget, interpreted
from torch import Tensor

from kdkernels.reference import relational_kl
from kdkernels.testing import numerics
from kdkernels.testing.opinfo import network_features, randn

CPU = torch.device("cpu")


def _with(case: Case, **options: Any) -> Case:
    """The same case with some options changed."""
    return replace(case, sample=replace(case.sample, kwargs={**case.sample.kwargs, **options}))


# Features as networks give them: offset and spread of `network_features`, before its ReLU. Samples
# of the OpInfo are between the two.
NETWORKS = {"relu": (0.0, 1.0), "offset_3": (3.0, 1.0)}


def _near_teacher(case: Case, kind: str, distance: float, *shape: int) -> Case:
    """A student so far from its teacher, in features of a kind."""
    offset, spread = NETWORKS[kind]
    sides = (
        network_features(
            *shape, seed=9, device=case.device, dtype=case.dtype, offset=offset, spread=spread,
            distance=d,
        )
        for d in (distance, 0.0)
    )  # fmt: skip
    return case.having(*sides, name=f"{kind}-{distance:g}")


def _network_cases() -> list[Any]:
    """Every distance; one in Triton's interpreter, which is slow, and runs samples of the OpInfo
    at all of them."""
    every = gram.each_backend(dtypes=(torch.float32,), algorithms=gram.ALGORITHMS, reduction="none")
    return [
        pytest.param(param.values[0], distance, id=f"{param.id}-{distance:g}", marks=param.marks)
        for param in every.args[1]
        for distance in (1e-1, 1e-2, 1e-3, 1e-4)
        if distance == 1e-2 or not param.id.startswith("triton-cpu")
    ]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("normalize", ["row_l2", "feature", "none"])
@pytest.mark.parametrize(("case", "distance"), _network_cases())
def test_features_of_a_network_near_those_of_its_teacher(
    case: Case, normalize: str, kind: str, distance: float
) -> None:
    """Where the definition is right in fp32, nothing excuses a difference of nearly equal Grams.
    The definition may have one loss right by luck, hardly those of all groups."""
    moved = _with(_near_teacher(case, kind, distance, 24, 32, 8), normalize=normalize)
    assert_within_budget(moved, moved.errors())


@pytest.mark.parametrize("shape", [(256, 64), (1024, 64)], ids=["256x64", "1024x64"])
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("normalize", ["row_l2", "feature", "none"])
@gram.each_backend(dtypes=(torch.float32,), algorithms=("factored",))
def test_factors_of_large_batches_near_those_of_the_teacher(
    case: Case, normalize: str, kind: str, shape: tuple[int, int]
) -> None:
    """A rounded product with a factor is common to all rows that the factor stands for: its error,
    in budgets, grows with the batch."""
    moved = _with(_near_teacher(case, kind, 1e-2, *shape), normalize=normalize)
    assert_within_budget(moved, moved.errors())


@pytest.mark.parametrize("normalize", ["row_l2", "feature", "none"])
@gram.each_backend(dtypes=(torch.float32,), algorithms=gram.ALGORITHMS, reduction="sum")
def test_the_negated_loss_has_the_negated_gradient(case: Case, normalize: str) -> None:
    """Bit for bit: what a backward decides by its coefficients is free of the sign of dout."""
    case = _near_teacher(case, "offset_3", 1e-2, 70, 8)
    student = case.sample.args[0].clone().requires_grad_()
    value = case.call(student, case.sample.args[1], normalize=normalize)
    of_value, of_negated = (
        torch.autograd.grad(value, student, sign * torch.ones_like(value), retain_graph=True)[0]
        for sign in (1, -1)
    )
    assert torch.equal(of_negated, -of_value)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["centred", "offset_3"])
@kl.each_backend(torch.float32)
def test_the_gradient_near_the_teacher(case: Case, offset: float, distance: float) -> None:
    """The two softmaxes nearly cancel, and with a common offset all keys point the same way: what
    rounds a whole row at once would be larger than the gradient. Judged by the gradient's own
    size."""
    B, K, D = (12, 300, 16) if interpreted(case.backend, case.device) else (32, 1300, 64)
    rows, noise, keys = (
        randn(n, D, seed=seed, device=CPU, dtype=torch.float64) for seed, n in enumerate((B, B, K))
    )
    rows, keys = rows + offset, keys + offset
    args = tuple(x.to(case.device, torch.float32) for x in (rows + distance * noise, rows, keys))

    def gradient(function: Any, dtype: torch.dtype) -> Tensor:
        student, *rest = (x.to(dtype) for x in args)
        options = {"teacher_temperature": 0.1, "reduction": "sum"}
        value = function(student.requires_grad_(), *rest, **options)
        return torch.autograd.grad(value, student)[0]

    hi, low = (gradient(relational_kl, dtype) for dtype in (torch.float64, torch.float32))
    out = gradient(case.call, torch.float32)
    error = numerics.compare("dstudent", out, hi, low, torch.float32)
    assert error.ok, error.detail
