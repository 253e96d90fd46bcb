# SPDX-License-Identifier: Apache-2.0
"""RelationalRepresentationLoss: published values, steps of the public code, options, state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from values import QUEUE, STUDENT, TEACHER, waves

import kdkernels as kd
from kdkernels.testing import numerics

RRD = kd.nn.RelationalRepresentationLoss


def rows(B: int = 6, D: int = 4, grad: bool = True) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("preset", ["2025", "2024"])
def test_the_queue_may_move_on_before_the_backward(preset: str) -> None:
    module = RRD(4, 5, dim=3, queue_size=8, preset=preset).double()
    before = copy.deepcopy(module).eval()
    student, teacher = rows(), rows(6, 5)
    loss = module(student, teacher)
    module.queue.enqueue(rows(6, 3, grad=False))
    got = torch.autograd.grad(loss, [student, *module.embed_student.parameters()])
    if preset == "2025":
        before.queue.enqueue(F.normalize(before.embed_teacher(teacher)))
    expected = before(student, teacher)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, [student, *before.embed_student.parameters()])
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w)


def published(preset: str, **options: Any) -> nn.Module:
    """With projections that change nothing, and a queue that can be written down."""
    module = RRD(16, 16, dim=16, queue_size=32, preset=preset, **options).double()
    with torch.no_grad():
        for layer in (module.embed_student, module.embed_teacher):
            layer.weight.copy_(torch.eye(16))
            layer.bias.zero_()
        module.queue.keys.copy_(QUEUE)
    return module


# Values of the authors' code in fp64, of the version that enqueues first.
@pytest.mark.parametrize(
    ("divergence", "value"), [("cross_entropy", 11.854216726955), ("kl", 11.376975730463)]
)
def test_relational_representation_has_the_published_value(divergence: str, value: float) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = published("2025", divergence=divergence)(student, TEACHER)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item() - value) < numerics.FP64_RELATIVE * value
    assert abs(gradient.norm().item() - 1.400027038602) < numerics.FP64_RELATIVE


def test_the_earlier_version_scores_first() -> None:
    student, teacher = STUDENT, TEACHER
    module = published("2024", weight=3)
    old = module.queue.keys.clone()
    loss = module(student, teacher)
    options = {"student_temperature": 0.04, "teacher_temperature": 0.1}
    expected = kd.relational_kl(student, teacher, old, **options, divergence="cross_entropy")
    torch.testing.assert_close(loss, 3 * expected)
    torch.testing.assert_close(module.queue.keys[:8], F.normalize(teacher))
    assert torch.equal(module.queue.keys[8:], old[8:])


def step_of_the_public_code(
    student: Tensor, teacher: Tensor, queue: Tensor, at: int, preset: str
) -> tuple[Tensor, Tensor, int]:
    """Loss, queue and position after one step, written like the authors' code."""
    s, t = F.normalize(student, dim=1), F.normalize(teacher, dim=1).detach()
    after = queue.clone()
    after[at : at + len(t)] = t
    scored = after if preset == "2025" else queue
    tau_s, tau_t = {"2025": (0.1, 0.02), "2024": (0.04, 0.1)}[preset]
    p = (t @ scored.T / tau_t).softmax(1)
    log_q = (s @ scored.T / tau_s).log_softmax(1)
    return -(p * log_q).sum(1).mean(), after, (at + len(t)) % len(queue)


@pytest.mark.parametrize("preset", ["2025", "2024"])
@pytest.mark.parametrize("init", ["random", "columns"])
def test_follows_the_public_code_from_either_start(preset: str, init: str) -> None:
    """Its steps while the first keys are there and after; for "columns" those have a norm that
    counts."""
    module = RRD(16, 16, dim=16, queue_size=24, preset=preset, init=init).double()
    queue, at = module.queue.keys.clone(), 0
    small = queue.norm(dim=1).mean() < 0.9
    assert small == (init == "columns")
    for step in range(4):
        student = waves(8, 16, 0.9 + step, 0.31, 0.5).requires_grad_()
        teacher = waves(8, 16, 0.7, 0.23 + step, 0.1)
        embedded = module.embed_student(student), module.embed_teacher(teacher)
        expected, queue, at = step_of_the_public_code(*embedded, queue, at, preset)
        loss = module(student, teacher)
        torch.testing.assert_close(loss, expected)
        wanted = torch.autograd.grad(expected, student)
        torch.testing.assert_close(torch.autograd.grad(loss, student), wanted)
        torch.testing.assert_close(module.queue.keys, queue)


def test_the_teacher_is_a_constant_and_maps_are_flattened() -> None:
    module = RRD(12, 20, dim=5, queue_size=9).double()
    student = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    module(student, teacher).backward()
    assert teacher.grad is None
    assert module.embed_teacher.weight.grad is None
    assert not module.embed_teacher.weight.requires_grad
    for x in (student, *module.embed_student.parameters()):
        assert x.grad.isfinite().all()
        assert x.grad.ne(0).any()


def test_evaluation_leaves_the_queue_alone() -> None:
    module = RRD(4, 5, dim=3, queue_size=8).double().eval()
    keys = module.queue.keys.clone()
    module(rows(), rows(6, 5))
    assert torch.equal(module.queue.keys, keys)
    assert module.queue.next.item() == 0


def test_state_survives_a_round_trip() -> None:
    module, other = (RRD(4, 5, dim=3, queue_size=8).double() for _ in range(2))
    student, teacher = rows(), rows(6, 5)
    module(student, teacher)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(student, teacher), other(student, teacher))
    assert torch.equal(module.queue.keys, other.queue.keys)


@pytest.mark.parametrize("preset", ["2025", "2024"])
def test_relational_representation_compiles_into_one_graph(preset: str) -> None:
    student, teacher = rows(), rows(6, 5, grad=False)
    module = RRD(4, 5, dim=3, queue_size=8, preset=preset).double()
    eager = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        results = [call(student, teacher) for call in (compiled, eager)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in results))
        assert torch.equal(module.queue.keys, eager.queue.keys)


def test_half_precision_under_autocast() -> None:
    module = RRD(4, 5, dim=3, queue_size=8)
    student, teacher = rows().detach().bfloat16().requires_grad_(), rows(6, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.isfinite().all()


def test_names_its_options() -> None:
    named = "preset='2024', init='random', student_temperature=0.04, teacher_temperature=0.1"
    assert named in repr(RRD(4, 5, preset="2024", queue_size=8))


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "student_dim must be from 1 to"),
        ((4, 4), {"queue_size": -1}, ValueError, "queue_size must be from 1 to"),
        ((4, 4), {"preset": "2023"}, ValueError, "preset must be one of '2025', '2024'"),
        ((4, 4), {"init": "empty"}, ValueError, "init must be one of 'random', 'columns'"),
        ((4, 4), {"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be a"),
        ((4, 4), {"divergence": "js"}, ValueError, "divergence must be one of"),
        ((4, 4, -1), {}, ValueError, "weight must be a finite number"),
        ((4, 4), {"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(
    args: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        RRD(*args, **options)
    assert message in str(raised.value)


def test_bad_features() -> None:
    with pytest.raises(ValueError, match="teacher must have 6 rows like student"):
        RRD(4, 5, queue_size=8)(rows(), rows(5, 5))
