# SPDX-License-Identifier: Apache-2.0
"""Options that are numbers, of every public function: from Python, NumPy, or a tensor."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdkernels.testing.opinfo import OpInfo, opinfos


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _options(info: OpInfo) -> dict[str, float]:
    """All that are numbers by default, as a sample has them, or by default."""
    parameters = inspect.signature(info.function).parameters.values()
    found = {x.name: x.default for x in parameters if _is_number(x.default)}
    return {**found, **{k: v for k, v in _sample(info).kwargs.items() if _is_number(v)}}


def _sample(info: OpInfo) -> Any:
    return next(iter(info.samples(torch.device("cpu"), torch.float32)))


def _value(info: OpInfo, **options: Any) -> Any:
    sample = _sample(info)
    torch.manual_seed(0)
    return info.function(*sample.args, **{**sample.kwargs, **options})


NUMBERS = [(info, name) for info in opinfos() for name in _options(info)]
each_number = pytest.mark.parametrize(
    ("info", "option"), NUMBERS, ids=[f"{info.name}-{name}" for info, name in NUMBERS]
)


@each_number
def test_numbers_of_any_kind_are_taken(info: OpInfo, option: str) -> None:
    value = _options(info)[option]
    if isinstance(value, int):
        kinds: tuple[Any, ...] = (np.int64, np.int32, np.uint8, np.array, torch.tensor)
    else:
        kinds = (np.float32, np.float64, np.array, torch.tensor)
    for kind in kinds:
        given = kind(value)  # which may round it
        wanted = _value(info, **{option: given.item()})
        torch.testing.assert_close(
            _value(info, **{option: given}), wanted, rtol=0, atol=0, equal_nan=True
        )


@each_number
@pytest.mark.parametrize(
    "given",
    [True, np.True_, "1", None, 1j, torch.ones(2), torch.tensor(True), torch.tensor(1j)],
    ids=str,
)
def test_what_is_no_number_is_refused_by_name(info: OpInfo, option: str, given: Any) -> None:
    if given is None and option == "num_keys":
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{option} must "):
        _value(info, **{option: given})


@each_number
def test_no_gradient_is_lost(info: OpInfo, option: str) -> None:
    """A tensor that asks for one gets it, or is refused."""
    value = _options(info)[option]
    if isinstance(value, int):
        return
    for shape in ((), (1,)):
        given = torch.full(shape, value, requires_grad=True)
        try:
            result = _value(info, **{option: given})
        except ValueError as error:
            assert str(error).startswith(f"{option} must be")  # noqa: PT017
            assert "temperature" not in option or info.op != "relational_kl"
            continue
        result.sum().backward()
        assert isinstance(given.grad, Tensor)
        assert given.grad.shape == shape
