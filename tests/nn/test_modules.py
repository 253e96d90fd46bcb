# SPDX-License-Identifier: Apache-2.0
"""What the modules of several losses have in common: composition with torch, state, names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from modules import CASES, congruence, maps, stateful
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd


@pytest.mark.parametrize(
    "module",
    [kd.nn.SimilarityPreservingLoss(), kd.nn.IntraUtteranceSimilarityLoss(), kd.nn.RKDLoss()],
)
def test_losses_without_parameters_have_no_state(module: nn.Module) -> None:
    assert not module.state_dict()
    module.load_state_dict({}, strict=True)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "sp": (kd.nn.SimilarityPreservingLoss, (6, 3, 4), (6, 20)),
    "sp-torchdistill": (
        lambda: kd.nn.SimilarityPreservingLoss(preset="torchdistill"),
        (6, 3, 4),
        (6, 20),
    ),
    "iusp": (kd.nn.IntraUtteranceSimilarityLoss, (2, 6, 3), (2, 6, 4)),
    "rkd": (kd.nn.RKDLoss, (6, 3, 4), (6, 20)),
    "cc-paper": (lambda: congruence("paper"), (6, 3, 4), (6, 20)),
    "cc-torchdistill": (lambda: congruence("torchdistill"), (6, 3, 4), (6, 20)),
    "cc-repdistiller": (lambda: congruence("repdistiller"), (6, 3, 4), (6, 20)),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiles_without_a_graph_break(name: str) -> None:
    make, student_shape, teacher_shape = MODULES[name]
    module, teacher = make(), maps(*teacher_shape)
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        student = torch.linspace(-1, 1, math.prod(student_shape), dtype=torch.float64).reshape(
            student_shape
        )
        student = student.sin().requires_grad_()
        loss = call(student, teacher)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[1], results[0])


def _floats(module: nn.Module) -> dict[str, float]:
    """The attributes that the constructor took as a float."""
    parameters = inspect.signature(type(module)).parameters.values()
    names = [parameter.name for parameter in parameters if "float" in str(parameter.annotation)]
    values = {name: getattr(module, name, None) for name in names}
    return {name: float(value) for name, value in values.items() if type(value) in (int, float)}


@pytest.mark.parametrize("name", CASES)
def test_floats_that_change_make_two_graphs(name: str) -> None:
    """One graph for the first values, and one for all others."""
    case = CASES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, scheduled = (case.make().double() for _ in range(2))
    scheduled.load_state_dict(eager.state_dict())
    compiled = torch.compile(scheduled, backend=counter, fullgraph=True)
    floats = _floats(eager)
    assert floats
    for step in range(12):
        student, *others = case.inputs(5)
        for option, first in floats.items():
            for module in (eager, scheduled):
                setattr(module, option, (first or 1.0) / (1 + step / 16))
        results = []
        for call in (eager, compiled):
            student = student.detach().requires_grad_()
            torch.manual_seed(step)  # losses that draw draw the same
            loss = call(student, *others, **case.options(5))
            loss.backward()
            results.append((loss.detach(), student.grad))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", sorted(set(CASES) - set(stateful())))
def test_gradients_of_torch_func_are_those_of_autograd(name: str) -> None:
    """Of the student and of all parameters. Under a transform torch refuses to move a state."""
    case = CASES[name]
    module = case.make().double()
    student, *others = case.inputs(5)
    options = case.options(5)

    def loss(parameters: dict[str, Tensor], student: Tensor) -> Tensor:
        torch.manual_seed(0)  # losses that draw draw the same
        return torch.func.functional_call(module, parameters, (student, *others), options)

    parameters = dict(module.named_parameters())
    found = torch.func.grad(loss, (0, 1))(
        {key: value.detach() for key, value in parameters.items()}, student
    )
    student.requires_grad_()
    loss(parameters, student).backward()
    assert torch.equal(found[1], student.grad)
    for key, value in parameters.items():
        wanted = torch.zeros_like(value) if value.grad is None else value.grad
        assert torch.equal(found[0][key], wanted), key


@pytest.mark.parametrize("name", MODULES)
def test_losses_of_half_precision_come_back_in_fp32_under_autocast(name: str) -> None:
    make, student_shape, teacher_shape = MODULES[name]
    module = make().float()
    student, teacher = (
        maps(*student_shape).bfloat16().requires_grad_(),
        maps(*teacher_shape).float(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", MODULES)
def test_not_a_number_stays_one(name: str) -> None:
    make, student_shape, teacher_shape = MODULES[name]
    student = maps(*student_shape)
    student[1] = math.nan
    assert make()(student, maps(*teacher_shape)).isnan()


OUTPUTS: dict[str, Callable[[], nn.Module]] = {
    "pkt": kd.nn.PKTLoss,
    "flow": lambda: kd.nn.PKTLoss(preset="information_flow"),
    "dist": kd.nn.DISTLoss,
    "r2kd": kd.nn.CorrelationDistanceLoss,
    "comparative": kd.nn.ComparativeLoss,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_each_module_in_torch(name: str) -> None:
    """No state, one graph, fp32 for half precision, no gradient of the teacher, NaN kept."""
    module: nn.Module = OUTPUTS[name]()
    assert not module.state_dict()
    student, teacher = maps(6, 5).requires_grad_(), maps(6, 5).requires_grad_()
    loss = module(student, teacher)
    loss.backward()
    assert teacher.grad is None
    gradient, student.grad = student.grad, None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(student, teacher)
    compiled.backward()
    torch.testing.assert_close((compiled, student.grad), (loss, gradient))
    half = student.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(half, teacher.detach().float())
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad.isfinite().all()
    broken = student.detach().clone()
    broken[1, 1] = torch.nan
    assert module(broken, teacher).isnan()


def test_repr_names_the_meaning() -> None:
    assert repr(kd.nn.SimilarityPreservingLoss()) == (
        "SimilarityPreservingLoss(weight=3000, preset='paper', algorithm='auto', backend='auto')"
    )
    assert repr(kd.nn.IntraUtteranceSimilarityLoss(2)) == (
        "IntraUtteranceSimilarityLoss(weight=2, algorithm='auto', backend='auto')"
    )
    assert repr(kd.nn.RKDLoss()) == (
        "RKDLoss(distance_weight=25, angle_weight=50, preset='repdistiller', backend='auto')"
    )
    assert repr(kd.nn.CorrelationCongruenceLoss()) == (
        "CorrelationCongruenceLoss("
        "weight=0.003, preset='paper', gamma=0.4, order=2, backend='auto')"
    )
    embedded = repr(congruence("repdistiller"))
    assert "weight=0.02, preset='repdistiller'" in embedded
    assert "gamma" not in embedded
    assert "(embed_teacher): Linear(in_features=20, out_features=6, bias=True)" in embedded
    assert repr(kd.nn.PKTLoss()) == "PKTLoss(weight=30000, preset='repdistiller', backend='auto')"
    assert repr(kd.nn.DISTLoss(preset="cifar")) == (
        "DISTLoss(weight=2, preset='cifar', beta=1, gamma=1, temperature=4, backend='auto')"
    )
    assert "temperature=4, rank='hard', backend" in repr(kd.nn.CorrelationDistanceLoss())
    assert repr(kd.nn.ComparativeLoss()) == "ComparativeLoss(weight=1)"
