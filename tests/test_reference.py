# SPDX-License-Identifier: Apache-2.0
"""The definitions as users call them, where a second derivative is refused: `kdkernels.reference`
holds every public function, by its name and with its arguments."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from cases import each_info, is_float
from torch import Tensor

import kdkernels as kd
from kdkernels import reference
from kdkernels.testing import numerics
from kdkernels.testing.opinfo import OpInfo, Sample

CPU, FP64 = torch.device("cpu"), torch.float64
FUNCTIONS = {name: f for name, f in vars(kd).items() if inspect.isfunction(f)}
PUBLIC = sorted(set(FUNCTIONS) - {"explain", "use_backend"})
SECOND_DERIVATIVE = r"Use the function of the same name in kdkernels\.reference"


def test_every_public_function_has_its_definition() -> None:
    assert sorted(reference.__all__) == PUBLIC
    assert kd.reference is reference


@pytest.mark.parametrize("name", PUBLIC)
def test_a_definition_has_the_arguments_of_the_public_function(name: str) -> None:
    def arguments(function: Any, *without: str) -> list[Any]:
        found = inspect.signature(function).parameters.values()
        return [parameter for parameter in found if parameter.name not in without]

    definition = getattr(reference, name)
    assert arguments(definition) == arguments(getattr(kd, name), "backend", "algorithm")
    assert definition.__doc__


@each_info()
def test_the_oracle_is_the_definition_that_users_call(info: OpInfo) -> None:
    assert info.definition is getattr(reference, info.public)


def samples(info: OpInfo) -> list[Sample]:
    return list(info.samples(CPU, FP64))


@each_info()
def test_the_advice_of_the_refusal_works(info: OpInfo) -> None:
    """The function that it names has the value and the gradient of the one that refuses, and torch
    differentiates that twice."""
    sample = max(tiny(info), key=lambda sample: sample.args[0].numel())
    places = list(info.places(sample.args).values())

    def called(function: Any, options: dict[str, Any]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        args = list(sample.args)
        for place in places:
            args[place] = args[place].detach().clone().requires_grad_()
        leaves = [args[place] for place in places]
        value = function(*args, **options)
        weights = torch.rand(value.shape, generator=torch.Generator().manual_seed(0), dtype=FP64)
        grads = torch.autograd.grad((weights * value).square().sum(), leaves, create_graph=True)
        return value.detach(), list(grads), leaves

    value, grads, leaves = called(info.function, {**sample.kwargs, "backend": "reference"})
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        torch.autograd.grad(grads[0].square().sum(), leaves)
    options = {k: v for k, v in sample.kwargs.items() if k not in info.algorithm_options}
    wanted, wanted_grads, leaves = called(getattr(reference, info.public), options)
    errors = [
        numerics.compare(what, found.detach(), true.detach(), true.detach(), FP64)
        for what, found, true in zip(
            ("value", *(f"d{i}" for i in places)), (value, *grads), (wanted, *wanted_grads),
            strict=True,
        )
    ]  # fmt: skip
    assert all(error.ok for error in errors), [error.detail for error in errors]
    penalty = sum(grad.square().sum() for grad in wanted_grads)
    second = torch.autograd.grad(penalty, leaves, allow_unused=True)
    assert any(x is not None and bool((x != 0).any()) for x in second)


def tiny(info: OpInfo) -> list[Sample]:
    """One of each set of options, of few numbers."""
    found: dict[str, Sample] = {}
    for sample in samples(info):
        size = sum(x.numel() for x in (*sample.args, *sample.kwargs.values()) if is_float(x))
        if sample.args[0].numel() > 6 and size <= 1500 and not sample.cancels:
            found.setdefault(
                str({k: v for k, v in sample.kwargs.items() if type(v) is str}), sample
            )
    return list(found.values())


@each_info()
def test_definitions_are_differentiable_twice(info: OpInfo) -> None:
    """Against difference quotients of first derivatives, in one random direction."""
    chosen = tiny(info)
    assert chosen
    for sample in chosen:
        places = list(info.places(sample.args).values())
        leaves = [sample.args[place].detach().requires_grad_() for place in places]

        def call(*moved: Tensor, sample: Sample = sample, places: list[int] = places) -> Tensor:
            args = list(sample.args)
            for place, x in zip(places, moved, strict=True):
                args[place] = x
            return info.define(sample, tuple(args))

        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True), sample.name


@each_info()
def test_second_derivatives_are_finite_at_zero_and_equal_rows(info: OpInfo) -> None:
    """Samples after a ReLU have such rows."""
    for sample in tiny(info):
        args = list(sample.args)
        leaves = []
        for place in info.places(args).values():
            x = args[place].detach().clone()
            if x.dim() > 1 and x.shape[-2] > 3:
                x[..., 1, :] = 0
                x[..., 2, :] = x[..., 3, :]
            args[place] = x.requires_grad_()
            leaves.append(x)
        value = info.define(sample, tuple(args))
        grads = torch.autograd.grad(value.square().sum(), leaves, create_graph=True)
        # steep where a norm is clamped, so the penalty is not that of its square
        penalty = sum(grad.abs().clamp_max(1.0).sum() for grad in grads)
        second = torch.autograd.grad(penalty, leaves, allow_unused=True)
        assert all(bool(x.isfinite().all()) for x in second if x is not None), sample.name


def literals() -> list[Any]:
    return [
        pytest.param(name, option, id=f"{name}-{option}")
        for name in PUBLIC
        for option, hint in get_type_hints(getattr(reference, name)).items()
        if get_origin(hint) is Literal
    ]


@pytest.mark.parametrize(("name", "option"), literals())
def test_a_word_that_a_definition_does_not_know_is_refused(name: str, option: str) -> None:
    allowed = get_args(get_type_hints(getattr(reference, name))[option])
    with pytest.raises(ValueError, match=rf"^{option} must be one of '{allowed[0]}'"):
        getattr(reference, name)(**{option: "other"})


def test_definitions_promote_as_the_public_functions_do() -> None:
    student = torch.randn(7, 5, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(7, 6)
    value = reference.gram_mse(student, teacher)
    assert torch.equal(value, reference.gram_mse(student.float(), teacher))
    value.backward()
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("given", [False, True])
def test_random_negatives_are_those_that_would_be_drawn_next(given: bool) -> None:
    student, teacher = (torch.randn(19, 4, dtype=FP64) for _ in range(2))
    labels = torch.randint(4, (19,)) - 2
    labels[5] = 40
    options = {"generator": torch.Generator().manual_seed(3)} if given else {}
    for _ in range(3):
        wanted = reference.triplet_distillation(student, teacher, labels, **options)
        torch.testing.assert_close(
            kd.triplet_distillation(student, teacher, labels, **options), wanted
        )
    assert reference.triplet_distillation(student[:0], teacher[:0], labels[:0]) == 0


def test_mined_triplets_are_those_of_the_public_function() -> None:
    rows, labels = torch.randn(23, 4, dtype=FP64), torch.randint(4, (23,))
    for options in ({}, {"references": rows.flip(1), "reference_labels": labels.flip(0)}):
        for negatives in ("hardest", "semihard", "easiest"):
            found = reference.mine_triplets(rows, labels, negatives=negatives, **options)
            wanted = kd.mine_triplets(rows, labels, negatives=negatives, **options)
            torch.testing.assert_close(found, wanted)
            assert torch.equal(found.anchors, wanted.anchors)


def test_codes_are_those_of_the_public_function() -> None:
    features, weight = torch.randn(9, 5), torch.randn(21, 5)
    assert torch.equal(reference.lsh_encode(features, weight), kd.lsh_encode(features, weight))
