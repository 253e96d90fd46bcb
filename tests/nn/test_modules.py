# SPDX-License-Identifier: Apache-2.0
"""What the modules of several losses have in common: composition with torch, state, names."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import CASES, congruence, maps, process_state
from torch import nn

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


# Which modules hand them to operators as they are, so that a graph has them as constants.
BAKED = {
    ("CorrelationCongruenceLoss", "gamma"),
    ("DISTLoss", "beta"),
    ("DISTLoss", "gamma"),
    ("DISTLoss", "temperature"),
    ("CorrelationDistanceLoss", "temperature"),
    ("BatchSemiHardTripletLoss", "margin"),
    ("BatchAllTripletLoss", "margin"),
    ("ContrastiveLoss", "margin"),
    ("PairDistillationLoss", "margin"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_float_may_follow_a_schedule(name: str) -> None:
    case = CASES[name]
    floats = [key for key, value in vars(case.make()).items() if type(value) is float]
    for key in floats:
        if (name.split()[0], key) in BAKED:
            continue
        graphs = []
        torch._dynamo.reset()
        module = case.make().double()
        eager = copy.deepcopy(module)
        compiled = torch.compile(
            module,
            fullgraph=True,
            backend=lambda graph, _, graphs=graphs: graphs.append(1) or graph,
        )
        for step in range(12):
            for one in (module, eager):
                setattr(one, key, 0.2 + 0.06 * step)
            args, seed = case.inputs(6), torch.get_rng_state()
            found = compiled(*args, **case.options(6))
            torch.set_rng_state(seed)
            torch.testing.assert_close(found, eager(*args, **case.options(6)))
        assert len(graphs) <= 2, key


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
