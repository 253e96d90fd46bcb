# SPDX-License-Identifier: Apache-2.0
"""The queue, against a list that drops its oldest rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdkernels as kd

QUEUE = kd.nn.KeyQueue


def rows(B: int = 6, D: int = 4) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64)


class SlowQueue:
    """A list of rows per side, each at the place where it was written."""

    def __init__(self, queue: kd.nn.KeyQueue) -> None:
        kept = (queue.keys, queue.student_keys)
        self.sides = [list(keys.clone()) for keys in kept if keys is not None]
        self.written, self.full = 0, queue.init != "empty"

    def enqueue(self, *batches: Tensor) -> list[int]:
        places = []
        for i in range(len(batches[0])):
            places.append(self.written % len(self.sides[0]))
            for side, batch in zip(self.sides, batches, strict=True):
                side[places[-1]] = batch[i]
            self.written += 1
        return places

    def check(self, queue: kd.nn.KeyQueue) -> None:
        size = len(self.sides[0])
        for side, keys in zip(self.sides, (queue.keys, queue.student_keys), strict=False):
            assert torch.equal(keys, torch.stack(side))
        assert queue.next.item() == self.written % size
        assert queue.num_keys.item() == (size if self.full else min(self.written, size))


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 9),
    draws=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["go on", "reload", "copy"]))),
    student_dim=st.sampled_from([None, 3]),
    init=st.sampled_from(["random", "columns", "empty"]),
)
def test_holds_the_last_rows(
    size: int, draws: list[tuple[float, str]], student_dim: int | None, init: Any
) -> None:
    """For any batch sizes up to its own, through saved states and copies."""
    options = {"student_dim": student_dim, "init": init}
    queue = QUEUE(size, 2, **options).double()
    model = SlowQueue(queue)
    for share, then in draws:
        B = round(share * size)
        batch = (rows(B, 2), rows(B, 3))[: len(model.sides)]
        assert queue.enqueue(*batch).tolist() == model.enqueue(*batch)
        model.check(queue)
        if then == "reload":
            state = copy.deepcopy(queue.state_dict())
            queue = QUEUE(size, 2, **options).double()
            queue.load_state_dict(state)
        elif then == "copy":
            queue = copy.deepcopy(queue)


def test_starts_with_what_it_is_told() -> None:
    queue = QUEUE(9, 4, student_dim=3)
    for keys in (queue.keys, queue.student_keys):
        torch.testing.assert_close(keys.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(QUEUE(9, 4, init="columns").keys.norm(dim=0), torch.ones(4))
    assert not QUEUE(9, 4, init="empty").keys.any()
    drawn = [QUEUE(9, 4, generator=torch.Generator().manual_seed(3)).keys for _ in range(2)]
    assert torch.equal(*drawn)


def test_keeps_its_state_and_its_dtype() -> None:
    assert set(QUEUE(9, 4).state_dict()) == {"keys", "next", "num_keys"}
    both = QUEUE(9, 4, student_dim=2)
    assert set(both.state_dict()) == {"keys", "student_keys", "next", "num_keys"}
    assert not list(both.parameters())
    assert repr(both) == "KeyQueue(size=9, dim=4, student_dim=2, init='random')"
    half = QUEUE(9, 4).half()
    places = half.enqueue(torch.full((2, 4), 0.1))
    assert half.keys.dtype == torch.float16
    assert half.next.dtype == half.num_keys.dtype == places.dtype == torch.int64
    assert torch.equal(half.keys[:2], torch.full((2, 4), 0.1, dtype=torch.float16))


def test_enqueued_rows_are_constants() -> None:
    queue = QUEUE(5, 4).double()
    queue.enqueue(rows().requires_grad_()[:3])
    assert not queue.keys.requires_grad


def test_only_what_was_enqueued_counts() -> None:
    queue = QUEUE(8, 4, init="empty").double()
    student, teacher = rows(), rows()
    with pytest.raises(ValueError, match="num_keys must be from 1 to 8, got 0"):
        kd.relational_kl(student, teacher, queue.keys, num_keys=queue.num_keys)
    for count in (3, 7, 8):
        queue.enqueue(rows(4)[: count - int(queue.num_keys)])
        loss = kd.relational_kl(student, teacher, queue.keys, num_keys=queue.num_keys)
        expected = kd.relational_kl(student, teacher, queue.keys[:count])
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("student_dim", [None, 3])
def test_compiles_into_one_graph(student_dim: int | None) -> None:
    queue = QUEUE(7, 2, student_dim=student_dim, init="empty").double()
    eager = copy.deepcopy(queue)
    torch._dynamo.reset()
    compiled = torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (3, 7, 2, 5):
        batch = (rows(B, 2), rows(B, 3))[: 1 if student_dim is None else 2]
        assert torch.equal(compiled(*batch), eager.enqueue(*batch))
        for name, value in eager.state_dict().items():
            assert torch.equal(queue.state_dict()[name], value)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "size must be from 1 to"),
        ((4, 1.5), {}, TypeError, "dim must be an integer, got float"),
        ((4, 4), {"student_dim": 0}, ValueError, "student_dim must be from 1 to"),
        ((4, 4), {"init": "zeros"}, ValueError, "init must be one of 'random', 'columns', 'empty'"),
    ],
)
def test_bad_options(
    args: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        QUEUE(*args, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("student_dim", "batch", "error", "message"),
    [
        (None, (rows(6, 5),), ValueError, "rows must have 4 columns like keys, got 5"),
        (None, (rows()[0],), ValueError, "rows must have at least 2 dimensions"),
        (None, (rows(9),), ValueError, "rows must be at most 8, the size of the queue, got 9"),
        (None, (rows(), rows()), ValueError, "student_rows must be None for a queue without"),
        (None, (rows().to("meta"),), ValueError, "rows must be on cpu like keys, got meta"),
        (3, (rows(),), TypeError, "student_rows must be a torch.Tensor, got NoneType"),
        (3, (rows(), rows()), ValueError, "student_rows must have 3 columns like student_keys"),
        (3, (rows(), rows(5, 3)), ValueError, "student_rows must have 6 rows like rows, got 5"),
    ],
)
def test_bad_rows_change_nothing(
    student_dim: int | None, batch: Any, error: type[Exception], message: str
) -> None:
    queue = QUEUE(8, 4, student_dim=student_dim)
    before = copy.deepcopy(queue.state_dict())
    with pytest.raises(error) as raised:
        queue.enqueue(*batch)
    assert message in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())
