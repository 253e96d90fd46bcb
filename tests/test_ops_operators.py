# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, the operator pair: schemas, fakes, bad inputs and torch.compile."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from cases import (
    DEVICES,
    Calls,
    Case,
    each_case,
    each_info,
    elements,
    few,
    gradients,
    leaves,
    recorded,
    samples,
    sources,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from kdkernels import _dispatch, _native
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos

ONE = {"pick": lambda found: few(found)[:1]}
KERNELS = tuple(backend for backend in _dispatch.BACKENDS if backend != "reference")


def _permuted(arg: Any) -> Any:
    """The same numbers, dense, with the last two dimensions swapped in memory."""
    return arg.mT.contiguous().mT if isinstance(arg, Tensor) and arg.dim() >= 2 else arg


@each_case(backends=("reference",))
def test_opcheck(case: Case) -> None:
    """With all options; schema, fake and registration are the same for all backends."""
    for func, args, _ in recorded(case):
        torch.library.opcheck(func, args)


@each_case(**ONE, backends=("reference",))
def test_operators_take_tensors_for_floats(case: Case) -> None:
    for func, args, results in recorded(case):
        packet = getattr(torch.ops.kdkernels, func._opname)
        kinds = [str(argument.type) for argument in func._schema.arguments]
        assert packet.overloads() == (["default", "Tensor"] if "float" in kinds else ["default"])
        if "float" not in kinds:
            continue
        changing = tuple(
            torch.tensor(arg, dtype=torch.float64) if kind == "float" else arg
            for kind, arg in zip(kinds, args, strict=True)
        )
        torch.library.opcheck(packet.Tensor, changing)
        got = packet.Tensor(*changing)
        got, wanted = (x if isinstance(x, (tuple, list)) else (x,) for x in (got, results))
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@each_case(**ONE, backends=KERNELS)
def test_opcheck_of_kernels(case: Case) -> None:
    for func, args, _ in recorded(case):
        torch.library.opcheck(func, args)


@each_case(**ONE)
def test_opcheck_of_permuted_arguments(case: Case) -> None:
    for func, args, _ in recorded(case.having(*map(_permuted, case.sample.args))):
        torch.library.opcheck(func, tuple(map(_permuted, args)))


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.storage_offset()


@each_case(dtypes=(torch.float16, torch.float32, torch.float64))
def test_fakes_have_the_form_of_results(case: Case) -> None:
    for permute in (False, True):
        tried = case.having(*map(_permuted, case.sample.args)) if permute else case
        for func, args, results in recorded(tried):
            with FakeTensorMode() as mode:
                fakes = func(
                    *(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args)
                )
            assert [_form(fake) for fake in fakes] == [_form(result) for result in results]


@each_case(**ONE)
def test_public_function_runs_on_fake_tensors(case: Case) -> None:
    args = leaves(case)
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(arg) for arg in args]
        value = case.call(*args)
        grads = torch.autograd.grad(value.sum(), sources(args))
    expected = case.call(*case.sample.args)
    assert (value.shape, value.dtype, value.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
    assert [grad.shape for grad in grads] == [source.shape for source in sources(args)]


def _bad_inputs() -> list[pytest.param]:
    return [
        pytest.param(info, bad, id=f"{info.name}-{device.type}-{bad.name}")
        for info in opinfos()
        for device in DEVICES
        for bad in info.bad_inputs(device)
    ]


@pytest.mark.parametrize(("info", "bad"), _bad_inputs())
def test_bad_input_raises_before_any_launch(info: OpInfo, bad: Any) -> None:
    with Calls() as calls, pytest.raises(bad.error, match=re.escape(bad.message)):
        info.function(*bad.args, **bad.kwargs)
    assert calls.made == []


@each_info()
def test_samples_and_bad_inputs_have_names_of_their_own(info: OpInfo) -> None:
    device = torch.device("cpu")
    for found in (info.samples(device, torch.float32), info.bad_inputs(device), info.bench):
        names = [entry.name for entry in found]
        assert len(names) == len(set(names))


def _compiled(case: Case, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(lambda *args: case.call(*args) * 3, fullgraph=True, **options)


def _assert_compiled_equals_eager(case: Case, compiled: Any) -> None:
    args = leaves(case)
    value = compiled(*args)
    got = [value.detach(), *gradients(value, args)]
    args = leaves(case)
    value = case.call(*args) * 3
    for g, wanted in zip(got, [value.detach(), *gradients(value, args)], strict=True):
        assert torch.equal(g, wanted)


@each_case(backends=("reference",))
def test_compile_fullgraph(case: Case) -> None:
    """With all options; the graph is the same for all backends."""
    _assert_compiled_equals_eager(case, _compiled(case, backend="aot_eager"))


@each_case(**ONE, backends=KERNELS)
def test_compile_fullgraph_of_kernels(case: Case) -> None:
    _assert_compiled_equals_eager(case, _compiled(case, backend="aot_eager"))


def _floats(info: OpInfo) -> list[str]:
    """The options that take a float."""
    parameters = inspect.signature(info.function).parameters.values()
    return [parameter.name for parameter in parameters if "float" in str(parameter.annotation)]


@pytest.mark.parametrize(
    ("info", "name"),
    [
        pytest.param(info, name, id=f"{info.name}-{name}")
        for info in opinfos()
        for name in _floats(info)
    ],
)
def test_a_float_that_changes_makes_two_graphs(info: OpInfo, name: str) -> None:
    """One graph for the first value, and one for all others. The graphs are the same for all
    backends."""
    found = few(samples(info, torch.device("cpu"), torch.float32))
    sample = next((s for s in found if type(s.kwargs.get(name)) is float), found[0])
    case = Case(info, "reference", torch.device("cpu"), torch.float32, sample)

    def call(value: float, *args: Any) -> Tensor:
        return case.call(*args, **{name: value}) * 3

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for step in range(12):
        results = []
        for function in (compiled, call):
            args = leaves(case)
            value = function(1.0 + step / 4, *args)
            results.append([value.detach(), *gradients(value, args)])
        assert all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))
    assert counter.frame_count == 2


def _same_options(found: Any) -> list[Sample]:
    """Two sizes for one compiled function."""
    plain = [
        sample
        for sample in found
        if sample.kwargs == found[0].kwargs and not sample.cancels and elements(sample) > 0
    ]
    return sorted(plain, key=elements)[:2]


@each_case(pick=lambda found: _same_options(found)[:1], backends=("reference",))
def test_compile_dynamic_shapes(case: Case) -> None:
    """The graph is the same for all backends, whose name is a constant in it."""
    compiled = _compiled(case, backend="aot_eager", dynamic=True)
    for sample in _same_options(samples(case.info, case.device, case.dtype)):
        other = case.having(*sample.args)
        if other.why_not() is None:  # sizes choose an algorithm, which a backend may not have
            _assert_compiled_equals_eager(other, compiled)


@each_case(**ONE, backends=("reference" if _native.load_error("kdkernels_cpu") else "cpu",))
def test_compile_with_inductor(case: Case) -> None:
    """On one backend: its name is a constant in the graph, and the generated code is the same."""
    _assert_compiled_equals_eager(case, _compiled(case, backend="inductor"))


@each_case(**ONE, backends=("reference",))
def test_compile_under_no_grad_and_with_one_gradient(case: Case) -> None:
    compiled = _compiled(case, backend="aot_eager")
    expected = case.call(*case.sample.args) * 3
    with torch.no_grad():
        assert torch.equal(compiled(*case.sample.args), expected)
    args = leaves(case, [True] + [False] * (len(case.places) - 1))
    (got,) = gradients(compiled(*args), args)
    (wanted,) = gradients(case.call(*args) * 3, args)
    assert torch.equal(got, wanted)
