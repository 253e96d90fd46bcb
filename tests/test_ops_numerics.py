# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, the numbers: every op, backend, dtype and sample against the definition in
fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from cases import (
    SHORT,
    Calls,
    Case,
    assert_within_budget,
    cases,
    each_case,
    each_info,
    few,
    gradients,
    is_float,
    leaves,
    operators,
    samples,
    sources,
)
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.testing import numerics
from kdkernels.testing.opinfo import OpInfo, Sample, clustered

ALL = tuple(SHORT)


@each_case(pick=lambda found: found, dtypes=ALL, interpret_all=True)
def test_loss_and_gradients_are_within_the_budget(case: Case) -> None:
    assert_within_budget(case, case.errors())


@each_case()
def test_two_runs_give_the_same_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        args = leaves(case)
        value = case.call(*args)
        runs.append([value.detach(), *gradients(value, args)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def _crossings() -> list[pytest.param]:
    found = [
        case
        for case in cases(dtypes=(torch.float32, torch.bfloat16))
        if case.why_not() is None and len(operators(case.info.op)) == 2
    ]
    runnable = {case.id for case in found}
    return [
        pytest.param(case, other, id=f"{case.id}-backward_on_{other}")
        for case in found
        for other in _dispatch.BACKENDS
        if other != case.backend
        and case.on(other).id in runnable
        and case.on(other).operator_args() == case.operator_args()
    ]


@pytest.mark.parametrize(("case", "other"), _crossings())
def test_residuals_cross_backends(case: Case, other: str) -> None:
    with Calls(bwd=other) as calls:
        errors = case.errors()
    assert [args[-1] for _, args, _ in calls.made] == [case.backend, other]
    assert_within_budget(case, errors)


def _zeroed(case: Case, which: tuple[int, ...], rows: list[int]) -> Case:
    args = list(case.sample.args)
    for index in which:
        args[index] = args[index].clone()
        args[index][..., rows, :] = 0
    return case.having(*args, name=f"{case.sample.name}-zero_rows", cancels=False)


def _smallest_side(sample: Sample) -> int:
    matrices = [arg for arg in sample.args if is_float(arg) and arg.dim() > 1]
    return min(min(matrix.shape[-2:]) for matrix in matrices)


def _zeroable() -> list[pytest.param]:
    found = cases(
        # of two rows one would be left, and in one column all cosines are 1: differences of equal
        # numbers
        pick=lambda found: few([sample for sample in found if _smallest_side(sample) > 2]),
        # a zero row's gradient is of the order of 1 / EPS, which fp16 cannot hold
        dtypes=(torch.float32, torch.float64),
    )
    params = []
    for case in found:
        floats = [i for i, arg in enumerate(case.sample.args) if is_float(arg) and arg.dim() > 1]
        for which in [(index,) for index in floats] + ([tuple(floats)] if len(floats) > 1 else []):
            name = f"{case.id}-{'_and_'.join(map(str, which))}"
            marks = [pytest.mark.gpu] if case.device.type == "cuda" else []
            params.append(pytest.param(case, which, id=name, marks=marks))
    return params


@pytest.mark.parametrize(("case", "which"), _zeroable())
def test_zero_rows_are_those_of_the_definition(case: Case, which: tuple[int, ...]) -> None:
    info, rows = case.info, [1]
    case = _zeroed(case, which, rows)
    if info.selects:  # which of the others, all equally far, is a matter of rounding
        value, grads = numerics.value_and_grads(case.call, case.sample.args, len(info.diff_args))
        assert all(torch.isfinite(tensor).all() for tensor in (value, *grads))
        return
    sample, n = case.sample, len(info.diff_args)
    hi, hi_grads = numerics.value_and_grads(
        lambda *a: info.define(sample, a), numerics.cast(sample.args, torch.float64), n
    )
    low, low_grads = numerics.value_and_grads(lambda *a: info.define(sample, a), sample.args, n)
    out, grads = numerics.value_and_grads(case.call, sample.args, n)
    loss_scale, scales = None, (None,) * len(grads)
    if info.subtracts:
        loss_scale, scales = info.magnitude(sample)
    errors = [numerics.compare("loss", out, hi, low, case.dtype, loss_scale)]
    # The others apart, because the zero rows' gradients may be so large that no error elsewhere
    # would show beside them. Zero rows are judged by the largest element of the whole gradient.
    for name, scale, *of_arg in zip(case.places, scales, grads, hi_grads, low_grads, strict=True):
        if of_arg[0].dim() < 2:
            errors.append(numerics.compare(f"d{name}", *of_arg, case.dtype))
            continue
        count = of_arg[0].shape[-2]
        for kind, index in (("zero", rows), ("other", [i for i in range(count) if i not in rows])):
            part = [grad[..., index, :] for grad in of_arg]
            assert all(torch.isfinite(grad).all() for grad in part)
            size = numerics.largest(scale[index] if isinstance(scale, Tensor) else scale)
            if size is None and kind == "zero":
                size = of_arg[1].abs().max().item()
            errors.append(numerics.compare(f"d{name}, {kind} rows, ", *part, case.dtype, size))
    assert_within_budget(case, errors)


CROWDS = {
    "duplicates": lambda x, seed: clustered(x, 0.0, seed),
    "clusters": lambda x, seed: clustered(x, 1e-3, seed),
    "offset": lambda x, seed: x + 30,
}


OF_DISTANCES = {"cuda": ("pairwise", "triplet", "triplet_all")}
OF_DISTANCES["triton"] = (*OF_DISTANCES["cuda"], "contrastive", "pkt", "rkd")


def _crowdable(found: Sequence[Sample]) -> list[Sample]:
    """Without semihard negatives, whose loss jumps where rounding decides if a negative is farther
    than the positive, and without gram_mse's factored form, which keeps fewer digits of such
    rows than the dense one."""
    return [
        sample
        for sample in few(found)
        if _smallest_side(sample) > 2
        and not any("semihard" in str(value) for value in sample.kwargs.values())
        and sample.kwargs.get("algorithm") != "factored"
    ]


def _crowded() -> list[pytest.param]:
    return [
        pytest.param(
            case, id=case.id, marks=[pytest.mark.gpu] if case.device.type == "cuda" else []
        )
        for case in cases(pick=_crowdable, interpret_all=True)
        # CUDA kernels add products up in an order of their own. The logits of rows far out are
        # rounded relative to their size, which the budgets of ops without distances do not know.
        # Triton's interpreter is slow: it runs the ops with distances only.
        if case.backend not in ("cuda", "triton") or case.info.op in OF_DISTANCES[case.backend]
    ]


@pytest.mark.parametrize("kind", CROWDS)
@pytest.mark.parametrize("case", _crowded())
def test_crowded_rows_are_within_the_budget(case: Case, kind: str) -> None:
    """Rows as a network gives them: some almost or exactly equal, or all of them far from 0. Of two
    candidates at almost the same distance either may be chosen: the loss is the same, and so are
    the gradients of the other rows."""
    args = [
        CROWDS[kind](arg, seed) if is_float(arg) and arg.dim() > 1 else arg
        for seed, arg in enumerate(case.sample.args)
    ]
    case = case.having(*args, name=f"{case.sample.name}-{kind}")
    contested = case.info.contested
    rows = None if contested is None else ~contested(case.sample)
    assert_within_budget(case, case.errors(rows))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
@each_case()
def test_non_finite_data_never_gives_a_finite_loss(case: Case, bad: float) -> None:
    for name, index in case.places.items():
        args = list(case.sample.args)
        args[index] = args[index].clone()
        args[index][(..., *(0, 0)[: args[index].dim()])] = bad
        finite = torch.isfinite(case.call(*args))
        expected = torch.isfinite(case.info.define(case.sample, tuple(args)))
        assert torch.equal(finite, expected), f"{bad} in {name}"
        taken = case.info.takes_minus_inf and bad == -math.inf
        if not taken and _gradient_of_first_row(case, name).any():
            assert not expected.all()


def _gradient_of_first_row(case: Case, name: str) -> Tensor:
    _, grads = numerics.value_and_grads(
        lambda *args: case.info.define(case.sample, args),
        case.sample.args,
        len(case.info.diff_args),
    )
    grad = grads[list(case.places).index(name)]
    return grad[..., 0, :] != 0 if grad.dim() > 1 else grad[0] != 0


@pytest.mark.parametrize("layout", ["expanded", "strided"])
@each_case(pick=lambda found: [sample for sample in few(found) if "none" in sample.kwargs.values()])
def test_layout_of_the_incoming_gradient_does_not_matter(case: Case, layout: str) -> None:
    args = leaves(case)
    value = case.call(*args)
    if layout == "expanded":
        dout = torch.rand((), device=value.device, dtype=value.dtype).expand(value.shape)
    else:
        dout = torch.rand((*value.shape, 3), device=value.device, dtype=value.dtype)[..., 1]
    got = torch.autograd.grad(value, sources(args), dout, retain_graph=True)
    wanted = torch.autograd.grad(value, sources(args), dout.contiguous())
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@each_case(dtypes=(torch.float64,), backends=("reference", "cpu"), devices=(torch.device("cpu"),))
def test_gradcheck(case: Case) -> None:
    args = leaves(case)
    grads = gradients(case.info.define(case.sample, tuple(args)), args)
    size = max(grad.abs().max().item() for grad in grads) or 1.0

    # gradients of order one, since gradcheck's tolerance is absolute
    def scaled(*args: Tensor) -> Tensor:
        return case.call(*args) / size

    assert torch.autograd.gradcheck(scaled, args, fast_mode=True)


VIEWS = {
    "column_major": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "padded_rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every_other_row": lambda x: (
        x.repeat_interleave(2, -2)[..., ::2, :] if x.dim() > 1 else x.repeat_interleave(2)[::2]
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@each_case(pick=lambda found: few(found)[:1], dtypes=ALL)
def test_every_layout_gives_the_same_loss(case: Case, view: str) -> None:
    """Views of the same numbers that are not contiguous."""
    args = [VIEWS[view](arg.contiguous()) for arg in case.sample.args]
    assert_within_budget(case, case.having(*args, name=view).errors())


@each_info()
def test_samples_cover_the_shape_vocabulary(info: OpInfo) -> None:
    names = {sample.name for sample in samples(info, torch.device("cpu"), torch.float32)}
    assert {
        "tiny",
        "aligned",
        "ragged_rows",
        "ragged_cols",
        "ragged_all",
        "one_row",
        "empty",
        "strided",
    } <= names
