# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call: precedence, refusals, threads, and what `kd.explain` says."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Calls, Case, cases, each_case, each_info, few, leaves, operators, samples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels.testing.opinfo import OpInfo, opinfos

ONE = {"pick": lambda found: few(found)[:1]}
CPU = torch.device("cpu")


def _case(info: OpInfo, backend: str = "auto") -> Case:
    return Case(info, backend, CPU, torch.float32, few(samples(info, CPU, torch.float32))[0])


def _used(case: Case, **kwargs: str) -> str:
    """The backend that the operator receives."""
    with Calls() as calls:
        case.info.function(*case.sample.args, **case.sample.kwargs, **kwargs)
    (call,) = calls.made
    return call[1][-1]


@each_case(**ONE)
def test_explain_names_what_runs(case: Case) -> None:
    args, kwargs = case.sample.args, case.sample.kwargs
    explanation = kd.explain(case.info.public, *args, backend=case.backend, **kwargs)
    assert explanation.backend == case.backend
    assert set(explanation.rejected) == set(_dispatch.BACKENDS) - {case.backend}
    assert all(explanation.rejected.values())
    text = str(explanation)
    assert text.splitlines()[0] == f"{case.info.public} on {case.device}"
    for name, reason in explanation.rejected.items():
        assert name in text
        assert reason in text
    for name, choice in explanation.choices.items():
        assert name in text
        assert choice in text


@each_info()
def test_auto_takes_the_first_backend_that_can(info: OpInfo) -> None:
    case = _case(info)
    able = [name for name in _dispatch.device_order(CPU) if case.on(name).why_not() is None]
    explanation = kd.explain(info.public, *case.sample.args, **case.sample.kwargs)
    assert explanation.backend == able[0]
    assert _used(case) == "auto"  # resolved inside the operator, so a trace does not depend on it


class _Operations(TorchDispatchMode):
    """Records every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _described(arg: Any) -> Any:
    return _dispatch.form(arg) if isinstance(arg, Tensor) else arg


def _requiring(case: Case, need: bool) -> list[Any]:
    return leaves(case, [need] * len(case.places))


@pytest.mark.parametrize("need", [False, True], ids=["constant", "differentiable"])
@each_case(
    pick=lambda found: found,
    dtypes=(torch.float16, torch.float64),
    backends=("reference",),
)
def test_explain_computes_nothing_and_describes_what_runs(
    case: Case, need: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, kwargs = _requiring(case, need), case.sample.kwargs
    with _Operations() as operations:
        explanation = kd.explain(case.info.public, *args, **kwargs)
        plan = _dispatch.plan(case.info.public, *args, **kwargs)
    assert operations.seen == []
    # the operator chooses the backend inside, from its tensors
    taken: list[str] = []
    select_name = _dispatch.select_name

    def recorded(*args: Any) -> str:
        taken.append(select_name(*args))
        return taken[-1]

    monkeypatch.setattr(_dispatch, "select_name", recorded)
    with Calls() as calls:
        case.info.function(*args, **kwargs)
    assert taken == [explanation.backend]
    ((operator, (*operator_args, _), _),) = calls.made
    assert operator._opname == f"{plan.op}_fwd"
    assert plan.operator_args == tuple(map(_described, operator_args))


@pytest.mark.parametrize(
    ("info", "bad"),
    [
        pytest.param(info, bad, id=f"{info.name}-{bad.name}")
        for info in opinfos()
        for bad in info.bad_inputs(CPU)
    ],
)
def test_explain_reads_no_numbers_and_refuses_all_else(info: OpInfo, bad: Any) -> None:
    kwargs = {name: value for name, value in bad.kwargs.items() if name != "backend"}
    backend, refused = bad.kwargs.get("backend", "auto"), None
    with _Operations() as operations:
        try:
            kd.explain(info.public, *bad.args, backend=backend, **kwargs)
        except bad.error as error:
            refused = str(error)
    assert operations.seen == []
    if refused is None:  # allowed only where the fault is a number inside an integer tensor
        number = r"\w+ must (be from -?\d+ to \d+, got -?\d+|leave each .*, got that of \w+ \d+)"
        assert re.fullmatch(number, bad.message)
        named = inspect.signature(info.function).bind(*bad.args, **bad.kwargs).arguments
        assert isinstance(named[bad.message.partition(" ")[0]], Tensor)
    else:
        assert bad.message in refused


def test_explain_computes_nothing_for_functions_without_an_opinfo() -> None:
    x, y, labels = torch.ones(8, 4), torch.zeros(8, 4), torch.zeros(8, dtype=torch.int32)
    with _Operations() as operations:
        mined = kd.explain("mine_triplets", x, labels, references=y, reference_labels=labels)
        encoded = kd.explain("lsh_encode", x, y, backend="reference")
        drawn = kd.explain("triplet_distillation", x, y, labels)
    assert operations.seen == []
    assert (mined.function, encoded.backend) == ("mine_triplets", "reference")
    assert drawn.choices == {"negatives": "drawn, no kernel runs"}


@pytest.mark.parametrize("backend", _dispatch.BACKENDS)
def test_an_op_without_a_kernel_is_named(backend: str) -> None:
    reason = importlib.import_module(f"kdkernels.{backend}").unavailable()
    assert _dispatch.implementation("no_op", backend) == (
        reason or f"no_op has no {backend} kernel"
    )


def test_explain_refuses_an_unknown_function() -> None:
    with pytest.raises(ValueError, match=r"function must be one of .*'gram_mse'.*, got 'gram'"):
        kd.explain("gram")


def test_explain_checks_the_arguments() -> None:
    x = torch.ones(8, 4)
    with pytest.raises(ValueError, match="teacher must have 8 rows like student, got 7"):
        kd.explain("gram_mse", x, x[:7])


@pytest.mark.parametrize(
    "absent",
    [case for case in cases(**ONE) if case.why_not() is not None],
    ids=lambda case: case.id.replace("-", "_"),
)
def test_an_absent_backend_is_refused_with_its_reason(absent: Case) -> None:
    with Calls() as calls, pytest.raises(kd.BackendUnavailableError) as caught:
        absent.call(*absent.sample.args)
    assert [name for name in calls.names() if name.endswith("_bwd")] == []
    message = str(caught.value)
    assert f"got {absent.backend!r}" in message
    assert absent.why_not() in message
    with pytest.raises(kd.BackendUnavailableError, match=re.escape(absent.why_not())):
        kd.explain(
            absent.info.public, *absent.sample.args, backend=absent.backend, **absent.sample.kwargs
        )


def test_an_absent_backend_is_both_kinds_of_error() -> None:
    assert issubclass(kd.BackendUnavailableError, RuntimeError)
    assert issubclass(kd.BackendUnavailableError, ValueError)


@each_info()
def test_precedence(info: OpInfo) -> None:
    case = _case(info)
    assert _used(case) == "auto"
    with kd.use_backend("reference"):
        assert _used(case) == "reference"
        with kd.use_backend("auto"):
            # the innermost context decides, and "auto" is a decision
            explanation = kd.explain(info.public, *case.sample.args, **case.sample.kwargs)
            assert explanation.backend == _dispatch.select_name(
                info.op, "auto", case.operator_args()
            )
        assert _used(case) == "reference"
    assert _used(case) == "auto"


@each_info()
def test_an_argument_wins_over_a_context(info: OpInfo) -> None:
    case = _case(info)
    with kd.use_backend("cuda"):
        assert _used(case, backend="reference") == "reference"


def test_a_context_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), kd.use_backend("reference"):
        raise KeyError
    assert _dispatch.requested_backend("auto") == "auto"


def test_a_context_refuses_an_unknown_name() -> None:
    expected = r"backend must be one of 'auto', 'reference'.*, got 'gpu'"
    with pytest.raises(ValueError, match=expected), kd.use_backend("gpu"):
        pass


def test_a_context_belongs_to_its_thread() -> None:
    inside, leave = threading.Event(), threading.Event()
    seen: dict[str, str] = {}

    def other() -> None:
        with kd.use_backend("cpu"):
            inside.set()
            leave.wait(10)
            seen["other"] = _dispatch.requested_backend("auto")

    thread = threading.Thread(target=other)
    with kd.use_backend("reference"):
        thread.start()
        assert inside.wait(10)
        seen["this"] = _dispatch.requested_backend("auto")
        leave.set()
        thread.join()
    assert seen == {"this": "reference", "other": "cpu"}
    assert _dispatch.requested_backend("auto") == "auto"


@each_info()
def test_a_backward_uses_the_backend_of_its_forward(info: OpInfo) -> None:
    case = _case(info)
    args = leaves(case)
    with Calls() as calls:
        with kd.use_backend("reference"):
            value = info.function(*args, **case.sample.kwargs)
        value.backward(torch.ones_like(value))
    assert [args[-1] for _, args, _ in calls.made] == ["reference"] * len(operators(info.op))


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(_dispatch.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_variable() -> None:
    code = (
        "import torch, kdkernels as kd; x = torch.randn(8, 4)\n"
        "print(kd.explain('gram_mse', x, x).backend)\n"
        "with kd.use_backend('auto'): print(kd._dispatch.requested_backend('auto'))"
    )
    done = _python(code, KDKERNELS_BACKEND="reference")
    assert (done.returncode, done.stdout.split()) == (0, ["reference", "auto"]), done.stderr


def test_environment_variable_with_an_unknown_name() -> None:
    done = _python("import kdkernels", KDKERNELS_BACKEND="fast")
    assert done.returncode != 0
    assert "ValueError: KDKERNELS_BACKEND must be one of 'auto'" in done.stderr
    assert "got 'fast'" in done.stderr


def test_import_loads_no_kernels() -> None:
    code = (
        "import sys, kdkernels\n"
        "kernels = 'triton', 'kdkernels._C'\n"
        "kernels += tuple(f'kdkernels.{name}' for name in ('cpu', 'triton', 'cuda'))\n"
        "loaded = [name for name in kernels if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
