# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, the schemas: native operators take what the operators of the package take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdkernels
from kdkernels import _native

assert kdkernels  # defines the operators
OPERATORS = sorted(torch.ops.kdkernels)
NATIVE = {
    "cpu": ("kdkernels_C", lambda: _native.load_error("kdkernels_cpu")),
    "cuda": ("kdkernels_cuda", _native.cuda_load_error),
}
# Operators of CUDA whose launcher in kdkernels/cuda prepares other arguments, and which.
PREPARED = {
    "triplet_fwd": "labels sorted, with the order of their rows",
    "triplet_all_fwd": "labels sorted, with the order of their rows",
}
# Operators that a native library has under another name, since the launcher calls it once per side.
RENAMED = {"cuda": {"triplet_bwd": "triplet_gradient"}, "cpu": {}}


def _native_schema(backend: str, name: str) -> Any | None:
    namespace, load_error = NATIVE[backend]
    if load_error() is not None:
        return None
    operator = getattr(getattr(torch.ops, namespace), name, None)
    return None if operator is None else operator.default._schema


def _arguments(schema: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in schema.arguments]


def _results(schema: Any) -> list[str]:
    return [str(result.type) for result in schema.returns]


def _native_operators(backend: str) -> list[str]:
    return [name for name in OPERATORS if _native_schema(backend, name) is not None]


def _wanted(name: str) -> Any:
    schema = getattr(torch.ops.kdkernels, name).default._schema
    *arguments, backend = _arguments(schema)
    assert backend == ("backend", "str")
    return arguments, _results(schema)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_flag_that_asks_for_a_gradient_names_a_tensor(name: str) -> None:
    kinds = dict(_arguments(getattr(torch.ops.kdkernels, name).default._schema))
    for argument, kind in kinds.items():
        if argument.startswith("need_"):
            assert kind == "bool"
            assert kinds[argument.removeprefix("need_")] in ("Tensor", "Optional[Tensor]")
    # the first argument decides about the device
    assert next(iter(kinds.values())) == "Tensor"


@pytest.mark.parametrize("name", _native_operators("cpu"))
def test_the_cpu_library_takes_the_same_arguments(name: str) -> None:
    schema = _native_schema("cpu", name)
    assert (_arguments(schema), _results(schema)) == _wanted(name)


@pytest.mark.parametrize("name", _native_operators("cuda"))
def test_the_cuda_library_takes_the_same_arguments_and_more(name: str) -> None:
    schema = _native_schema("cuda", name)
    arguments, results = _wanted(name)
    agrees = (_arguments(schema)[: len(arguments)], _results(schema)) == (arguments, results)
    if name in PREPARED:
        assert not agrees, "take it out of PREPARED"
    else:
        assert _arguments(schema)[: len(arguments)] == arguments
        assert _results(schema) == results


@pytest.mark.parametrize("backend", NATIVE)
def test_a_native_library_has_all_operators_of_an_op_or_none(backend: str) -> None:
    if NATIVE[backend][1]() is not None:
        return
    missing = set(OPERATORS) - set(_native_operators(backend))
    ops = {name.rpartition("_")[0] for name in _native_operators(backend)}
    assert ops
    renamed = RENAMED[backend]
    assert {name for name in missing if name.rpartition("_")[0] in ops} == set(renamed)
    assert all(_native_schema(backend, name) is not None for name in renamed.values())
