# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, autograd: which gradients come back, and what is refused."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from cases import (
    Calls,
    Case,
    assert_within_budget,
    each_case,
    few,
    gradients,
    is_float,
    leaves,
    needed,
    sources,
)
from torch import Tensor

from kdkernels.testing import numerics
from kdkernels.testing.opinfo import Sample

ONE = {"pick": lambda found: few(found)[:1]}  # where the options of a call make no difference


@each_case()
def test_every_subset_of_gradients(case: Case) -> None:
    places = case.places
    args = leaves(case)
    full_value = case.call(*args)
    full = dict(zip(places, gradients(full_value, args), strict=True))
    for need in itertools.product([False, True], repeat=len(places)):
        args = leaves(case, need)
        with Calls() as calls:
            value = case.call(*args)
            if any(need):
                value.backward(torch.ones_like(value))
        assert value.requires_grad == any(need)
        assert torch.equal(value, full_value)
        # an operator that computes what nobody asked for costs time
        flags = [flag for call in calls.made for flag in needed(call)]
        assert sum(flag for flag, _ in flags) == sum(need)
        assert [result.numel() > 0 for _, result in flags] == [flag for flag, _ in flags]
        args = leaves(case, need)
        got = iter(gradients(case.call(*args), args) if any(need) else [])
        for (name, place), wanted in zip(places.items(), need, strict=True):
            assert args[place].grad is None
            if wanted:
                assert torch.equal(next(got), full[name]), f"d{name} with requires_grad={need}"


@each_case(**ONE)
def test_backward_leaves_no_gradient_on_a_constant(case: Case) -> None:
    first, *others = leaves(case, [True] + [False] * (len(case.places) - 1))
    value = case.call(first, *others)
    value.backward(torch.ones_like(value))
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()
    assert all(other.grad is None for other in others if isinstance(other, Tensor))


@each_case(dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_gradients_have_the_form_of_their_arguments(case: Case) -> None:
    args = leaves(case)
    value = case.call(*args)
    assert value.dtype == case.info.result_dtype(case.dtype)
    for arg, grad in zip(sources(args), gradients(value, args), strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (arg.shape, arg.dtype, arg.device)


@each_case()
def test_double_backward_is_refused(case: Case) -> None:
    args = leaves(case)
    value = case.call(*args)
    dout = torch.ones_like(value)
    plain = torch.autograd.grad(value, sources(args), dout, retain_graph=True)
    grads = torch.autograd.grad(value, sources(args), dout, create_graph=True)
    for grad, expected in zip(grads, plain, strict=True):
        assert torch.equal(grad, expected)  # a first gradient is the same with create_graph=True
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(grad.sum(), sources(args), retain_graph=True)


@each_case(**ONE)
def test_inputs_changed_before_backward_are_noticed(case: Case) -> None:
    for index in case.places.values():
        args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in case.sample.args]
        for place in case.places.values():
            args[place].requires_grad_()
        value = case.call(*args)
        with torch.no_grad():
            args[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward(torch.ones_like(value))


@each_case()
def test_inputs_are_left_as_they_were(case: Case) -> None:
    before = [arg.clone() for arg in case.sample.args if isinstance(arg, Tensor)]
    args = leaves(case)
    gradients(case.call(*args), args)
    assert all(torch.equal(arg, copy) for arg, copy in zip(case.sample.args, before, strict=False))


@each_case(**ONE)
def test_backward_twice_through_one_graph(case: Case) -> None:
    args = leaves(case)
    value = case.call(*args)
    dout = torch.rand_like(value)
    first = torch.autograd.grad(value, sources(args), dout, retain_graph=True)
    second = torch.autograd.grad(value, sources(args), dout)
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))


def _through_linear(
    call: object, case: Case, weight: Tensor, autocast: bool
) -> tuple[Tensor, Tensor]:
    """A loss of a linear layer's output, and the gradient of the layer's weight."""
    x, *others = case.sample.args
    others = [other.to(weight.dtype) if is_float(other) else other for other in others]
    weight = weight.detach().requires_grad_()
    with torch.autocast(case.device.type, torch.bfloat16, enabled=autocast):
        value = call(torch.nn.functional.linear(x.to(weight.dtype), weight), *others)
        value = value.sum()
    (grad,) = torch.autograd.grad(value, weight)
    return value.detach(), grad


@each_case()
def test_autocast(case: Case) -> None:
    D = case.sample.args[0].shape[-1]
    weight = torch.randn(D, D, device=case.device) / D**0.5

    # bf16 out of the layer, the loss in full precision
    def rounded(x: Tensor, *others: Tensor) -> Tensor:
        with torch.autocast(case.device.type, enabled=False):
            return case.info.define(case.sample, (x.float(), *others))

    def defined(*args: Tensor) -> Tensor:
        return case.info.define(case.sample, args)

    seen = []

    def called(*args: Tensor) -> Tensor:
        seen.append([arg.dtype for arg in args])
        return case.call(*args)

    hi = _through_linear(defined, case, weight.double(), autocast=False)
    low = _through_linear(rounded, case, weight, autocast=True)
    out = _through_linear(called, case, weight, autocast=True)
    others = [torch.float32 if is_float(arg) else arg.dtype for arg in case.sample.args[1:]]
    assert seen == [[torch.bfloat16, *others]]  # mixed, as autocast leaves them
    widest = torch.float32 if torch.float32 in others else torch.bfloat16
    assert out[0].dtype == case.info.result_dtype(widest)
    assert_within_budget(
        case,
        [
            numerics.compare(what, *values, torch.bfloat16)
            for what, *values in zip(("loss", "dweight"), out, hi, low, strict=True)
        ],
    )


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXED = ((BF16, FP32), (FP32, BF16), (FP16, BF16), (FP64, FP32))  # of arguments, in turns


def _several_floats(sample: Sample) -> bool:
    return sum(map(_takes_part, (*sample.args, *sample.kwargs.values()))) > 1


def _takes_part(arg: object) -> bool:
    """Whether the dtype of an argument has a say in that of the others."""
    return is_float(arg) and arg.dim() > 0


@each_case(
    pick=lambda found: [sample for sample in few(found) if _several_floats(sample)],
    backends=("reference", "cpu"),
)
@pytest.mark.parametrize(
    ("dtypes", "autocast"), [*((dtypes, False) for dtypes in MIXED), (MIXED[0], True)], ids=str
)
def test_mixed_dtypes_give_what_the_widest_gives(
    case: Case, dtypes: tuple[torch.dtype, ...], autocast: bool
) -> None:
    wide, turn = functools.reduce(torch.promote_types, dtypes), itertools.cycle(dtypes)

    def mixed(arg: object) -> object:
        return arg.to(next(turn)) if _takes_part(arg) else arg

    def widened(arg: object) -> object:
        return arg.to(wide) if _takes_part(arg) else arg

    args = [mixed(arg) for arg in case.sample.args]
    options = {name: mixed(value) for name, value in case.sample.kwargs.items()}
    results = []
    for convert in (lambda arg: arg, widened):
        given = [convert(arg) for arg in args]
        for place in case.places.values():
            given[place] = given[place].detach().requires_grad_()
        with torch.autocast(case.device.type, BF16, enabled=autocast):
            value = case.call(*given, **{name: convert(x) for name, x in options.items()})
        results.append((value, gradients(value, given)))
    (value, grads), (wanted, wanted_grads) = results
    assert value.dtype == case.info.result_dtype(wide)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(value, wanted, **same)
    for place, grad, wide_grad in zip(case.places.values(), grads, wanted_grads, strict=True):
        assert grad.dtype == args[place].dtype
        torch.testing.assert_close(grad, wide_grad.to(grad.dtype), **same)
