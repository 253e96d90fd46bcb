# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, autograd: which gradients come back, and what is refused."""

from __future__ import annotations

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


@each_case(pick=lambda found: [sample for sample in few(found)[:1] if is_float(sample.args[1])])
def test_mixed_dtypes_are_for_autocast_only(case: Case) -> None:
    first, *others = case.sample.args
    with pytest.raises(TypeError, match=r"must be torch\.\w+ like"):
        case.call(first.bfloat16(), *others)
    with torch.autocast(case.device.type, torch.bfloat16):
        assert torch.isfinite(case.call(first.bfloat16(), *others)).all()
