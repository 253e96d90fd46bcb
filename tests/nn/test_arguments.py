# SPDX-License-Identifier: Apache-2.0
"""Every tensor and every word that a module takes: what is none is refused by name, and integers of
any width are taken. The arguments are found from signatures."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from bad_tensors import WORDS, annotated, in_place_of
from modules import BASES, CASES, Case
from torch import nn


def words() -> list[Any]:
    return [
        pytest.param(make, base, name, id=f"{make.__name__}-{name}-{base.get('preset')}")
        for make, base in BASES
        for name in annotated(make, "Literal", "Backend", "str", "Reduction")
    ]


@pytest.mark.parametrize(("make", "base", "name"), words())
def test_what_is_no_word_is_refused_by_name(
    make: type[nn.Module], base: dict[str, Any], name: str
) -> None:
    left_out = "None" in str(inspect.signature(make).parameters[name].annotation)
    left_out |= inspect.signature(make).parameters[name].default is None
    for given in WORDS.values():
        if not (given is None and left_out):
            with pytest.raises((TypeError, ValueError), match=rf"^{name} must be one of '"):
                make(**{**base, name: given})


def more(case: Case, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of forward that a case leaves out, but its module takes."""
    taken = inspect.signature(type(case.make()).forward).parameters
    found = {}
    if "references" in taken and not case.make().__dict__.get("self_positive"):
        found = {"references": args[0].flip(0), "reference_labels": args[1].flip(0)}
    if "positives" in taken and "own_keys" not in options and case.make().queue is None:
        found["positives"] = torch.arange(len(args[0]))
    if "codes" in taken and case.make().form != "l2":
        found["codes"] = torch.zeros(len(args[0]), 2, dtype=torch.uint8)
    return {**options, **found}


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_such_tensor_is_refused_by_name(name: str) -> None:
    case = CASES[name]
    args, module = case.inputs(6), case.make().double()
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    given = {
        **dict(zip(parameters, args, strict=False)),
        **more(case, args, case.options(6)),
    }
    assert module(**given).isfinite()
    for argument, value in given.items():
        bad = in_place_of(value)
        if "Features" in str(inspect.signature(type(module).forward).parameters[argument]):
            bad.pop("list")  # of layers, which are named with their places
        for what, other in bad.items():
            with pytest.raises((TypeError, ValueError), match=rf"^{argument} must ") as raised:
                case.make().double()(**{**given, argument: other})
            assert type(raised.value) in (TypeError, ValueError), what


@pytest.mark.parametrize("name", CASES)
def test_integers_of_any_width_are_taken(name: str) -> None:
    case = CASES[name]
    args = case.inputs(6)
    parameters = list(inspect.signature(type(case.make()).forward).parameters)[1:]
    given = {
        **dict(zip(parameters, args, strict=False)),
        **more(case, args, case.options(6)),
    }
    module = case.make().double()
    seed, losses = torch.get_rng_state(), []
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32):
        torch.set_rng_state(seed)
        other = {k: x.to(dtype) if x.dtype == torch.int64 else x for k, x in given.items()}
        losses.append(copy.deepcopy(module)(**other))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=0)
