# SPDX-License-Identifier: Apache-2.0
"""SEED, CompRess and SSKD: several steps of each formula, which rows count, state, arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import unit
from torch import Tensor

import kdkernels as kd
from kdkernels.ops.best_ranked import best_ranked

SD = kd.nn.SimilarityDistillationLoss
QUEUES = ("seed", "compress", "compress_1q")
PRESETS = (*QUEUES, "sskd")
STUDENT_DIM = 4


def rows(B: int = 8, D: int = STUDENT_DIM, grad: bool = True) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64, requires_grad=grad)


def make(preset: str, **options: Any) -> kd.nn.SimilarityDistillationLoss:
    dims = {"seed": (4,), "compress": (4, 6), "compress_1q": (4, 4), "sskd": ()}[preset]
    if preset in QUEUES:
        options = {"queue_size": 19, **options}
    return SD(*dims, preset=preset, **options).double()


def teacher_rows(preset: str, B: int = 8) -> Tensor:
    return rows(B, 6 if preset in ("compress", "sskd") else 4)


def seed(s: Tensor, t: Tensor, queue: Tensor, _: Any) -> Tensor:
    """The row's own key in the first of K + 1 columns."""
    own_s, own_t = (s * t).sum(1, keepdim=True), (t * t).sum(1, keepdim=True)
    p = F.softmax(torch.cat([own_t, t @ queue.T], 1) / 0.01, 1)
    return -(p * F.log_softmax(torch.cat([own_s, s @ queue.T], 1) / 0.2, 1)).sum(1).mean()


def compress(s: Tensor, t: Tensor, queue: Tensor, students: Tensor | None) -> Tensor:
    log_q = F.log_softmax(s @ (queue if students is None else students).T / 0.04, 1)
    return F.kl_div(log_q, F.softmax(t @ queue.T / 0.04, 1), reduction="batchmean")


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "seed": seed,
    "compress": compress,
    "compress_1q": compress,
}


@pytest.mark.parametrize("preset", QUEUES)
def test_several_steps_are_those_of_the_formula(preset: str) -> None:
    """Around the end of the queue, which the batch enters after the loss."""
    criterion = make(preset, weight=3)
    queue, students = criterion.queue.keys.clone(), criterion.queue.student_keys
    students, at = None if students is None else students.clone(), 0
    for _ in range(4):
        student, teacher = rows(), teacher_rows(preset)
        s, t = unit(student), unit(teacher).detach()
        expected = 3 * BY_HAND[preset](s, t, queue, students)
        loss = criterion(student, teacher)
        torch.testing.assert_close(loss, expected)
        got, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
        torch.testing.assert_close(got, wanted)
        places = (at + torch.arange(8)) % 19
        queue[places], at = t, at + 8
        torch.testing.assert_close(criterion.queue.keys, queue)
        if students is not None:
            students[places] = s.detach()
            torch.testing.assert_close(criterion.queue.student_keys, students)


def ranked_by_hand(rows: Tensor, keys: Tensor, positives: list[int], share: float) -> list[int]:
    """Rows that count, with Python's stable sort."""
    cosines = (unit(rows) @ unit(keys).T).tolist()
    ranks = []
    for row, positive in zip(cosines, positives, strict=True):
        order = sorted(range(len(row)), key=lambda j, row=row: -row[j])
        ranks.append(order.index(positive))
    wrong = [i for i, rank in enumerate(ranks) if rank > 0]
    best = sorted(wrong, key=lambda i: ranks[i])[: int(share * len(wrong))]
    return sorted([i for i, rank in enumerate(ranks) if rank == 0] + best)


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 20),
    K=st.integers(1, 7),
    share=st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0]),
    ties=st.booleans(),
    generator=st.integers(0, 2**31),
)
def test_the_best_ranked_rows_count(
    B: int, K: int, share: float, ties: bool, generator: int
) -> None:
    draw = torch.Generator().manual_seed(generator)
    x, keys = (torch.randn(n, 3, dtype=torch.float64, generator=draw) for n in (B, K))
    if ties:  # axes, whose cosines are 0 and 1 exactly
        x, keys = (torch.eye(3, dtype=torch.float64)[z.argmax(1)] for z in (x, keys))
    positives = torch.randint(K, (B,), generator=draw)
    counts = best_ranked(x, keys, positives, share)
    assert counts.nonzero().flatten().tolist() == ranked_by_hand(x, keys, positives.tolist(), share)


@pytest.mark.parametrize("share", [0.0, 0.75])
def test_views_are_compared_with_the_plain_images(share: float) -> None:
    """As the public code indexes the batch: every fourth row is plain."""
    student, teacher = rows(20), teacher_rows("sskd", 20)
    plain = torch.arange(20) % 4 == 0
    s, t = unit(student), unit(teacher).detach()
    positives = [i // 3 for i in range(15)]
    counting = ranked_by_hand(teacher[~plain].detach(), teacher[plain].detach(), positives, share)
    assert 0 < len(counting) < 15
    log_q = F.log_softmax(s[~plain] @ s[plain].T / 0.5, 1)[counting]
    p = F.softmax(t[~plain] @ t[plain].T / 0.5, 1)[counting]
    expected = 10 * 0.25 * F.kl_div(log_q, p, reduction="batchmean")
    loss = make("sskd", share_of_wrong=share)(student, teacher)
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(got, wanted)
    assert wanted[plain].ne(0).any()


def test_no_row_that_counts_costs_nothing() -> None:
    plain = torch.eye(2, dtype=torch.float64)
    teacher = torch.cat([plain, plain.flip(0)], 1).unflatten(1, (2, 2)).flatten(0, 1)
    student = rows(4, 2)
    loss = make("sskd", views=2, share_of_wrong=0.0)(student, teacher)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_empty_batch_costs_nothing(preset: str) -> None:
    student = rows(0)
    loss = make(preset)(student, teacher_rows(preset, 0))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_teacher_is_a_constant_and_evaluation_changes_nothing(preset: str) -> None:
    criterion = make(preset)
    teacher = teacher_rows(preset)
    criterion(rows(), teacher).backward()
    assert teacher.grad is None
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()(rows(), teacher)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("preset", QUEUES)
def test_state_goes_on_after_a_round_trip_and_a_copy(preset: str) -> None:
    first, other = make(preset), make(preset)
    student, teacher = rows(), teacher_rows(preset)
    first(student, teacher)
    third = copy.deepcopy(first)
    other.load_state_dict(first.state_dict())
    values = [one(student, teacher) for one in (first, other, third)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    for name, value in first.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert not list(first.parameters())
    assert not make("sskd").state_dict()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_compiles_into_one_graph(preset: str) -> None:
    criterion = make(preset)
    eager = copy.deepcopy(criterion)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        student, teacher = rows(), teacher_rows(preset)
        results = [call(student, teacher) for call in (compiled, eager)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in results))
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(criterion.state_dict()[name], value)


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_under_autocast(preset: str) -> None:
    student = rows(grad=False).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = make(preset).float()(student, teacher_rows(preset).float())
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.isfinite().all()
    assert student.grad.ne(0).any()


def test_defaults_are_the_published_ones() -> None:
    assert SD(2, preset="seed").queue.keys.shape == (65536, 2)
    assert SD(2, 3, preset="compress").queue.keys.shape == (128000, 3)
    assert make("compress_1q").weight == 1
    assert repr(make("sskd", views=2)) == (
        "SimilarityDistillationLoss(weight=10, preset='sskd', student_temperature=0.5, "
        "teacher_temperature=0.5, views=2, share_of_wrong=0.75, backend='auto')"
    )


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((), {}, TypeError, "student_dim must be an integer, got NoneType"),
        ((4, 5), {}, ValueError, "teacher_dim must be 4 like student_dim for preset 'seed', got 5"),
        ((4,), {"preset": "moco"}, ValueError, "preset must be one of 'seed', 'compress'"),
        ((4,), {"preset": "sskd"}, ValueError, "student_dim must be None for preset 'sskd', got 4"),
        ((4,), {"views": 4}, ValueError, "views must be None for preset 'seed', got 4"),
        ((), {"preset": "sskd", "views": 1}, ValueError, "views must be from 2 to"),
        (
            (),
            {"preset": "sskd", "share_of_wrong": 1.5},
            ValueError,
            "share_of_wrong must be from 0 to 1, got 1.5",
        ),
        ((4,), {"queue_size": 0}, ValueError, "queue_size must be from 1 to"),
        ((4,), {"student_temperature": 0}, ValueError, "student_temperature must be a positive"),
        ((4, 4, -1), {}, ValueError, "weight must be a finite number"),
        ((4,), {"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(
    args: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        SD(*args, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("preset", "student", "teacher", "message"),
    [
        ("seed", rows(8, 5), rows(8, 4), "student must have 4 columns, its student_dim, got 5"),
        ("compress", rows(), rows(), "teacher must have 6 columns, its teacher_dim, got 4"),
        ("seed", rows(), rows(7), "teacher must have 8 rows like student, got 7"),
        ("seed", rows(20), rows(20), "rows must be at most 19, the size of the queue, got 20"),
        ("sskd", rows(10), rows(10), "student must have a multiple of 4 rows, the views of each"),
    ],
)
def test_bad_features(preset: str, student: Tensor, teacher: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        make(preset)(student, teacher)
    assert message in str(raised.value)
