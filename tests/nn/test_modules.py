# SPDX-License-Identifier: Apache-2.0
"""What the modules of several losses have in common: composition with torch, state, names."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import CASES, assert_same_loss, congruence, maps, process_state, stateful
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels.nn import _arguments


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


@pytest.mark.parametrize("name", CASES)
def test_the_last_batch_may_be_smaller(name: str) -> None:
    """Compiled into one graph per kind of size, with the values of eager mode."""
    case, graphs = CASES[name], []
    module = case.make().double()
    eager = copy.deepcopy(module)

    def counted(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counted)
    for B in (6, 9, 7, 10, 4, 8):
        args, seed = case.inputs(B), torch.get_rng_state()
        student, results = args[0].requires_grad_(), []
        for call in (compiled, eager):
            torch.set_rng_state(seed)
            loss = call(*args, **case.options(B))
            results.append((loss, torch.autograd.grad(loss, student)[0]))
        torch.testing.assert_close(*results)
    assert len(graphs) < 5


def takes_layers(name: str) -> bool:
    forward = inspect.signature(type(CASES[name].make()).forward)
    hint = forward.parameters["student"].annotation if "student" in forward.parameters else ""
    trained = name.startswith("CorrelationCongruenceLoss") and not name.endswith("paper")
    return hint == "Features" and not trained


LAYERED = [name for name in CASES if takes_layers(name)]


def test_these_modules_take_layers() -> None:
    assert {name.split()[0].removesuffix("Loss") for name in LAYERED} == {
        "SimilarityPreserving",
        "IntraUtteranceSimilarity",
        "RKD",
        "CorrelationCongruence",
        "PKT",
        "DIST",
        "CorrelationDistance",
        "Comparative",
    }


@pytest.mark.parametrize("kind", [list, tuple, dict, OrderedDict])
@pytest.mark.parametrize("name", LAYERED)
def test_the_losses_of_layers_are_summed(name: str, kind: type) -> None:
    case = CASES[name]
    module, layers = case.make().double(), [case.inputs(B) for B in (6, 4, 6)]
    students = [student.requires_grad_() for student, _ in layers]
    separate = sum(module(*pair) for pair in layers)
    if issubclass(kind, dict):
        names = ("layer2", 7, "head")
        sides = [kind(zip(names, side, strict=True)) for side in zip(*layers, strict=True)]
        sides[1] = {key: sides[1][key] for key in reversed(names)}  # pairs are by name
    else:
        sides = [kind(side) for side in zip(*layers, strict=True)]
    assert_same_loss(module(*sides), separate, *students)


@pytest.mark.parametrize("name", CASES)
def test_an_argument_that_is_none_is_named(name: str) -> None:
    """As a hook that did not fire gives it."""
    case = CASES[name]
    parameters = inspect.signature(type(case.make()).forward).parameters
    args = case.inputs(6)
    for i, parameter in enumerate(list(parameters)[1 : len(args) + 1]):
        given = [None if j == i else x for j, x in enumerate(args)]
        if parameter == "negatives":
            continue  # None draws them
        with pytest.raises((TypeError, ValueError), match=rf"^{parameter} must be .*None"):
            case.make().double()(*given, **case.options(6))


@pytest.mark.parametrize("name", ["DISTLoss", "CorrelationDistanceLoss"])
def test_each_pixel_of_a_map_is_a_row(name: str) -> None:
    module, student, teacher = CASES[name].make(), maps(2, 5, 3, 4), maps(2, 5, 3, 4)
    student.requires_grad_()
    rows = [
        torch.stack([x[b, :, i, j] for b in range(2) for i in range(3) for j in range(4)])
        for x in (student, teacher)
    ]
    assert_same_loss(module(student, teacher), module(*rows), student)


BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def floating_state(module: nn.Module) -> list[torch.Tensor]:
    found = [*module.parameters(), *module.buffers(), *process_state(module).values()]
    return [x for x in found if x.is_floating_point()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "dtypes", [(BF16, FP32), (FP32, BF16), (BF16, BF16), (FP64, FP32)], ids=str
)
def test_mixed_dtypes_give_what_the_widest_gives(
    name: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Of student, teacher and what the module has of its own, which stays in fp32 here."""
    case = CASES[name]
    module, turn = case.make().float(), itertools.cycle(dtypes)
    args = [x.to(next(turn)) if x.is_floating_point() else x for x in case.inputs(6)]
    floats = [x for x in args if x.is_floating_point()]
    wide = functools.reduce(
        torch.promote_types, [x.dtype for x in (*floats, *floating_state(module))]
    )
    widened = [x.to(wide) if x.is_floating_point() else x for x in args]
    seed, results = torch.get_rng_state(), []
    for call, given in ((copy.deepcopy(module), args), (module, widened)):
        torch.set_rng_state(seed)
        student = given[0].requires_grad_()
        loss = call(*given, **case.options(6))
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    (loss, grad), (wanted, wanted_grad) = results
    assert loss.dtype == wanted.dtype
    assert grad.dtype == args[0].dtype
    exact = {"rtol": 0, "atol": 0}
    if isinstance(module, kd.nn.CLIPLoss):  # autograd adds what both directions give, in bf16
        exact = {}
    torch.testing.assert_close((loss, grad), (wanted, wanted_grad.to(grad.dtype)), **exact)


@pytest.mark.parametrize("of_layer", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_takes_any_dtype(
    of_layer: torch.dtype, dtype: torch.dtype, bias: bool
) -> None:
    linear = nn.Linear(5, 3, bias=bias, dtype=of_layer)
    wide = torch.promote_types(of_layer, dtype)
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    parameters = [p.to(wide) for p in linear.parameters()]
    out, wanted = _arguments.embedded(linear, x), F.linear(x.to(wide), *parameters)
    assert_same_loss(out.square().sum(), wanted.square().sum(), x, *linear.parameters())
    with torch.autocast("cpu", dtype=BF16):
        out = _arguments.embedded(linear, x)
    assert out.dtype == (FP64 if wide == FP64 else BF16)


@pytest.mark.parametrize("name", CASES)
def test_a_teacher_under_inference_mode(name: str) -> None:
    """As one under no_grad, in what is trained inside of the module too."""
    case, found = CASES[name], []
    student, *given = case.inputs(6)
    options = case.options(6)
    with torch.inference_mode():
        frozen = [x.clone() for x in given]
        frozen_options = {key: value.clone() for key, value in options.items()}
    for args, kwargs in ((given, options), (frozen, frozen_options)):
        torch.manual_seed(1)
        module = case.make().double()
        for _ in range(2):  # what the first step leaves meets the second
            leaf = student.clone().requires_grad_()
            loss = module(leaf, *args, **kwargs)
            loss.backward()
        trained = [x.grad for x in module.parameters() if x.requires_grad]
        found.append((loss.detach(), leaf.grad, *trained, *process_state(module).values()))
    for value, wanted in zip(*found, strict=True):
        assert torch.equal(value, wanted)


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
