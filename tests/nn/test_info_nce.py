# SPDX-License-Identifier: Apache-2.0
"""InfoNCELoss: the formula, its learned temperature, its queue, options, state."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd

NCE = kd.nn.InfoNCELoss


def rows(B: int = 6, D: int = 4, grad: bool = True) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64, requires_grad=grad)


def test_info_nce_pairs_by_order_or_as_it_is_told() -> None:
    queries, keys = rows(), rows(9)
    logits = F.normalize(queries) @ F.normalize(keys).T
    for positives in (None, torch.tensor([3, 3, 8, 0, 1, 2])):
        loss = NCE(2, temperature=0.5)(queries, keys, positives)
        labels = torch.arange(6) if positives is None else positives
        expected = 2 * F.cross_entropy(logits / 0.5, labels)
        torch.testing.assert_close(loss, expected)
        for got, wanted in zip(
            *(torch.autograd.grad(x, (queries, keys), retain_graph=True) for x in (loss, expected)),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)


def test_info_nce_learns_its_temperature() -> None:
    module = NCE(temperature=0.3, learn_temperature=True).double()
    queries, keys = rows(), rows(9)
    module(queries, keys).backward()
    assert set(module.state_dict()) == {"log_temperature"}
    log = module.log_temperature.detach().clone().requires_grad_()
    logits = F.normalize(queries) @ F.normalize(keys).T / log.exp()
    F.cross_entropy(logits, torch.arange(6)).backward()
    torch.testing.assert_close(module.log_temperature.grad, log.grad)
    assert not NCE().state_dict()


def disco() -> nn.Module:
    queue = kd.nn.KeyQueue(18, 4, init="empty")
    return NCE(temperature=math.exp(-1), learn_temperature=True, queue=queue).double()


def test_info_nce_with_a_queue_is_the_loss_of_the_public_code() -> None:
    """Newest keys first, the batch's before all, cut at the end; a queue that starts empty."""
    module = disco()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)  # logit_scale
    queue = torch.zeros(0, 4, dtype=torch.float64)
    for _ in range(4):
        student, teacher = rows(), rows()
        keys = torch.cat([F.normalize(teacher).detach(), queue])
        logits = scale.exp() * F.normalize(student) @ keys.T
        expected = F.cross_entropy(logits, torch.arange(6))
        loss = module(student, teacher)
        torch.testing.assert_close(loss, expected)
        got = torch.autograd.grad(loss, (student, module.log_temperature))
        wanted = torch.autograd.grad(expected, (student, scale))
        torch.testing.assert_close(got[0], wanted[0])
        torch.testing.assert_close(got[1], -wanted[1])  # one is minus the other
        queue = keys[: 18 - 6]
    assert set(module.state_dict()) == {
        "log_temperature", "queue.keys", "queue.next", "queue.num_keys"
    }  # fmt: skip


def test_info_nce_with_a_queue_in_evaluation_changes_nothing() -> None:
    module = disco()
    module(rows(), rows())
    before = copy.deepcopy(module.state_dict())
    student, teacher = rows(), rows()
    loss = module.eval()(student, teacher)
    keys = F.normalize(torch.cat([teacher, module.queue.keys[:6]]))
    expected = F.cross_entropy(F.normalize(student) @ keys.T * math.e, torch.arange(6))
    torch.testing.assert_close(loss, expected)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_info_nce_with_a_queue_goes_on_from_saved_state() -> None:
    module, other = disco(), disco()
    module(rows(), rows())
    other.load_state_dict(module.state_dict())
    student, teacher = rows(), rows()
    losses = [one(student, teacher) for one in (module, other, copy.deepcopy(other))]
    assert torch.equal(losses[0], losses[1])


def test_two_views_leave_the_other_view_of_an_image_out() -> None:
    """Of each query the keys are those of one view of the batch, and the queue before it."""
    module = NCE(temperature=0.3, queue=kd.nn.KeyQueue(18, 4, init="empty")).double()
    queue = torch.zeros(0, 4, dtype=torch.float64)
    for _ in range(5):
        s1, t1, s2, t2 = (rows() for _ in range(4))
        expected = 0
        for s, t in ((s1, t2), (s2, t1)):
            keys = torch.cat([F.normalize(t).detach(), queue[: 18 - 6]])
            expected = expected + F.cross_entropy(F.normalize(s) @ keys.T / 0.3, torch.arange(6))
        loss = module(s1, t2, update=False) + module(s2, t1)
        torch.testing.assert_close(loss, expected)
        for got, wanted in zip(
            *(torch.autograd.grad(x, (s1, s2)) for x in (loss, expected)), strict=True
        ):
            torch.testing.assert_close(got, wanted)
        queue = torch.cat([F.normalize(t1).detach(), queue])[:18]


def test_info_nce_compiles_into_one_graph() -> None:
    queries, keys = rows(), rows(9)
    module = NCE(learn_temperature=True).double()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    sources = (queries, keys, module.log_temperature)
    results = [call(queries, keys) for call in (compiled, module)]
    for got, wanted in zip(*(torch.autograd.grad(x, sources) for x in results), strict=True):
        torch.testing.assert_close(got, wanted)


def test_info_nce_with_a_queue_compiles_into_one_graph() -> None:
    module = disco()
    eager = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        student, teacher = rows(), rows(grad=False)
        results = [call(student, teacher) for call in (compiled, eager)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in results))
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value)


def test_names_its_options() -> None:
    assert repr(NCE(2)) == (
        "InfoNCELoss(weight=2, temperature=0.07, learn_temperature=False, normalize=True, "
        "backend='auto')"
    )


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((), {"temperature": float("nan")}, ValueError, "temperature must be a positive"),
        ((), {"learn_temperature": 1}, TypeError, "learn_temperature must be True or False"),
        ((), {"normalize": None}, TypeError, "normalize must be True or False"),
        ((), {"queue": 5}, TypeError, "queue must be a KeyQueue or None, got int"),
        (
            (),
            {"queue": kd.nn.KeyQueue(8, 4, student_dim=3)},
            ValueError,
            "queue must keep one side, got one with student_dim",
        ),
        ((), {"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(
    args: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        NCE(*args, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("call", "args", "message"),
    [
        (NCE(), (rows(), rows(5)), "keys must have at least 6 rows, one per query"),
        (NCE(), (rows(), rows(9, 3)), "keys must have 4 columns like queries, got 3"),
        (disco(), (rows(), rows(7)), "keys must have 6 rows like queries with a queue, got 7"),
        (disco(), (rows(), rows(), torch.arange(6)), "positives must be None with a queue"),
    ],
)
def test_bad_features(call: Any, args: Any, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        call(*args)
    assert message in str(raised.value)
