# SPDX-License-Identifier: Apache-2.0
"""Every tensor and every word that a public function takes: what is none is refused by name, and
integers of any width are taken. The arguments are found from signatures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bad_tensors import WORDS, annotated, in_place_of
from cases import each_info
from torch import Tensor

import kdkernels as kd
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos

CPU = torch.device("cpu")
WIDTHS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)


def named(info: OpInfo, sample: Sample) -> dict[str, Any]:
    return inspect.signature(info.function).bind(*sample.args, **sample.kwargs).arguments


def tensors() -> dict[tuple[str, str], tuple[OpInfo, Sample]]:
    """A sample with each tensor of each function."""
    found: dict[tuple[str, str], tuple[OpInfo, Sample]] = {}
    for info in opinfos():
        for sample in info.samples(CPU, torch.float32):
            if sample.args[0].numel() > 6:
                for name, value in named(info, sample).items():
                    if isinstance(value, Tensor):
                        found.setdefault((info.name, name), (info, sample))
        if "sample_mask" in inspect.signature(info.function).parameters:
            sample = next(iter(info.samples(CPU, torch.float32)))
            mask = torch.ones(sample.args[0].shape[:-1], dtype=torch.bool)
            masked = replace(sample, kwargs={**sample.kwargs, "sample_mask": mask})
            found.setdefault((info.name, "sample_mask"), (info, masked))
    return found


TENSORS = tensors()
each_tensor = pytest.mark.parametrize("key", TENSORS, ids="-".join)


def with_other(key: tuple[str, str], value: Any) -> Any:
    info, sample = TENSORS[key]
    return info.function(**{**named(info, sample), key[1]: value})


@each_info()
def test_every_tensor_is_tried(info: OpInfo) -> None:
    wanted = {
        name
        for name, parameter in inspect.signature(info.function).parameters.items()
        if "Tensor" in str(parameter.annotation)
    }
    tried = {name for op, name in TENSORS if op == info.name}
    # temperatures are numbers as a rule: tests/test_checks.py
    assert {name for name in wanted - tried if "temperature" not in name} == set()


@each_tensor
def test_what_is_no_such_tensor_is_refused_by_name(key: tuple[str, str]) -> None:
    info, sample = TENSORS[key]
    name, value = key[1], named(info, sample)[key[1]]
    parameter = inspect.signature(info.function).parameters[name]
    bad = in_place_of(value)
    if parameter.default is parameter.empty:
        bad["None"] = None
    if value.dim() == 0:
        bad.pop("list")  # a number
    for what, given in bad.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must ") as raised:
            with_other(key, given)
        assert type(raised.value) in (TypeError, ValueError), what
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must "):
            kd.explain(info.public, **{**named(info, sample), name: given})


def integers() -> Iterator[tuple[str, str]]:
    for key, (info, sample) in TENSORS.items():
        if named(info, sample)[key[1]].dtype in (torch.int64, torch.int32):
            yield key


@pytest.mark.parametrize("key", list(integers()), ids="-".join)
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_integers_of_any_width_are_taken(key: tuple[str, str], dtype: torch.dtype) -> None:
    info, sample = TENSORS[key]
    value = named(info, sample)[key[1]]
    value = value - value.min() if "labels" in key[1] else value.clamp_min(0)
    same = {"rtol": 0, "atol": 0}
    given = value.to(dtype)
    torch.testing.assert_close(with_other(key, given), with_other(key, given.long()), **same)


def words() -> list[Any]:
    return [
        pytest.param(info, name, id=f"{info.name}-{name}")
        for info in opinfos()
        for name in annotated(info.function, "Literal", "Backend")
    ]


@pytest.mark.parametrize(("info", "name"), words())
def test_what_is_no_word_is_refused_by_name(info: OpInfo, name: str) -> None:
    sample = next(iter(info.samples(CPU, torch.float32)))
    for given in WORDS.values():
        bad = replace(sample, kwargs={**sample.kwargs, name: given})
        for call in (info.function, lambda *a, **k: kd.explain(info.public, *a, **k)):
            with pytest.raises((TypeError, ValueError), match=rf"^{name} must be one of '"):
                call(*bad.args, **bad.kwargs)


def test_use_backend_and_mining_refuse_what_is_no_word() -> None:
    rows, labels = torch.randn(6, 3), torch.arange(6) % 2
    for given in WORDS.values():
        with (
            pytest.raises((TypeError, ValueError), match=r"^backend must be one of"),
            kd.use_backend(given),
        ):
            pass
        for name in annotated(kd.mine_triplets, "Literal", "Backend"):
            with pytest.raises((TypeError, ValueError), match=rf"^{name} must be one of"):
                kd.mine_triplets(rows, labels, **{name: given})
        with pytest.raises((TypeError, ValueError), match=r"^backend must be one of"):
            kd.lsh_encode(rows, rows, backend=given)
