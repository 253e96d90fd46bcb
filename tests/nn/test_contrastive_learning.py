# SPDX-License-Identifier: Apache-2.0
"""NTXentLoss, SupConLoss, CLIPLoss and MoCo's use of InfoNCELoss against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import assert_same_loss, maps
from torch import Tensor, nn

import kdkernels as kd


def leaf(*shape: int) -> Tensor:
    return maps(*shape).requires_grad_()


def log_softmax(x: Tensor, keys: Tensor, temperature: Any, out: Tensor) -> Tensor:
    a = F.normalize(x, dim=1) @ F.normalize(keys, dim=1).T / temperature
    return a.masked_fill(out, -torch.inf).log_softmax(1)


def supcon(x: Tensor, y: Tensor, keys: Tensor, key_labels: Tensor, out: Tensor, t: Any) -> Tensor:
    log_q = log_softmax(x, keys, t, out)
    positive = (y[:, None] == key_labels) & ~out
    rows = log_q.masked_fill(~positive, 0.0).sum(1) / positive.sum(1).clamp_min(1)
    return -rows.mean()


@pytest.mark.parametrize("negatives", [0, 5])
def test_nt_xent(negatives: int) -> None:
    first, second, more = leaf(6, 4), leaf(6, 4), leaf(negatives, 4)
    views = torch.cat([first, second])
    keys, i = torch.cat([views, more]), torch.arange(12)
    own = torch.eye(12, len(keys), dtype=torch.bool)
    expected = 2 * F.nll_loss(log_softmax(views, keys, 0.2, own), (i + 6) % 12)
    loss = kd.nn.NTXentLoss(2.0, temperature=0.2)(first, second, more if negatives else None)
    assert_same_loss(loss, expected, *((first, second, more) if negatives else (first, second)))


@pytest.mark.parametrize("views", [None, 1, 3])
def test_supcon(views: int | None) -> None:
    y = torch.tensor([4, 1, 4, 2, 1, 4, -7])  # 2 and -7 are alone where there is one view
    x = leaf(7, 4) if views is None else leaf(7, views, 4)
    rows, labels = x.reshape(-1, 4), y.repeat_interleave(views or 1)
    own = torch.eye(len(rows), dtype=torch.bool)
    expected = 0.5 * supcon(rows, labels, rows, labels, own, 0.1)
    assert_same_loss(kd.nn.SupConLoss(0.5, temperature=0.1)(x, y.to(torch.int32)), expected, x)


def test_supcon_of_views_without_labels_is_nt_xent() -> None:
    first, second = leaf(5, 4), leaf(5, 4)
    loss = kd.nn.SupConLoss(temperature=0.3)(torch.stack([first, second], 1))
    assert_same_loss(loss, kd.nn.NTXentLoss(temperature=0.3)(first, second), first, second)


def test_supcon_against_a_memory_that_holds_the_batch() -> None:
    x, memory = leaf(5, 4), leaf(11, 4)
    y, labels = torch.tensor([0, 1, 2, 0, 9]), torch.arange(11) % 3
    places = torch.tensor([3, -1, 10, 0, 2])
    out = places[:, None] == torch.arange(11)
    expected = supcon(x, y, memory, labels, out, 0.07)
    loss = kd.nn.SupConLoss()(x, y, memory, labels, exclude=places)
    assert_same_loss(loss, expected, x, memory)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_clip(masked: bool, learned: bool) -> None:
    images, texts = leaf(6, 4), leaf(6, 4)
    out = torch.rand(6, 6) < (0.4 if masked else 0.0)
    out.fill_diagonal_(False)
    module = kd.nn.CLIPLoss(3.0, temperature=0.25, learn_temperature=learned).double()
    first = module.log_temperature if learned else torch.tensor([0.25], dtype=torch.float64).log()
    log = first.detach().clone().requires_grad_()
    log_q = [
        log_softmax(a, b, log.exp(), mask)
        for a, b, mask in ((images, texts, out), (texts, images, out.T))
    ]
    expected = -1.5 * sum(x.diagonal().mean() for x in log_q)
    loss = module(images, texts, exclude=out if masked else None)
    torch.testing.assert_close(loss, expected)
    if learned:
        loss.backward()
        (by_log,) = torch.autograd.grad(expected, log)
        torch.testing.assert_close(module.log_temperature.grad, by_log)


def test_a_learned_temperature_of_clip_stops_at_its_bound() -> None:
    module, fixed = kd.nn.CLIPLoss(), kd.nn.CLIPLoss(temperature=0.01, learn_temperature=False)
    with torch.no_grad():
        module.log_temperature.fill_(-10.0)
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    torch.testing.assert_close(module(x, y), fixed(x, y))


def test_moco_has_negatives_only_in_its_queue() -> None:
    queue = kd.nn.KeyQueue(12, 4, init="empty").double()
    criterion, bank = kd.nn.InfoNCELoss(), maps(0, 4)
    for _ in range(4):
        queries, keys = leaf(5, 4), maps(5, 4)
        if len(bank):
            logits = torch.cat(
                [F.cosine_similarity(queries, keys)[:, None], F.normalize(queries) @ bank.T], 1
            )
            expected = F.cross_entropy(logits / 0.07, torch.zeros(5, dtype=torch.int64))
            loss = kd.info_nce(queries, queue.keys, own_keys=keys, num_keys=queue.num_keys)
            assert_same_loss(loss, expected, queries)
            if len(bank) == 12:
                assert_same_loss(criterion(queries, queue.keys, own_keys=keys), expected, queries)
        queue.enqueue(F.normalize(keys))
        bank = torch.cat([bank, F.normalize(keys)])[-12:]


def test_pytorch_metric_learning_computes_the_same() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    first, second = leaf(8, 5), leaf(8, 5)
    both, pairs, y = torch.cat([first, second]), torch.arange(8).repeat(2), torch.arange(16) % 5
    nt_xent = losses.NTXentLoss(temperature=0.2)(both, pairs)
    loss = kd.nn.NTXentLoss(temperature=0.2)(first, second)
    assert_same_loss(loss, nt_xent, first, second)
    supcon = losses.SupConLoss(temperature=0.1)(both, y)
    assert_same_loss(kd.nn.SupConLoss(temperature=0.1)(both, y), supcon, first, second)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: kd.nn.NTXentLoss()(x, x),
        lambda x: kd.nn.SupConLoss()(x, torch.zeros(0, dtype=torch.int64)),
        lambda x: kd.nn.CLIPLoss()(x, x),
    ],
)
def test_an_empty_batch_costs_nothing(loss: Any) -> None:
    x = torch.zeros(0, 4, dtype=torch.bfloat16, requires_grad=True)
    found = loss(x)
    assert found.dtype == torch.float32
    assert found.item() == 0
    found.backward()
    assert x.grad.shape == x.shape


def test_wrong_arguments_are_refused_by_name() -> None:
    x, y, q = torch.ones(6, 4), torch.arange(6), torch.ones(9, 4)
    supcon, clip, nt_xent = kd.nn.SupConLoss(), kd.nn.CLIPLoss(), kd.nn.NTXentLoss()
    queued = kd.nn.InfoNCELoss(queue=kd.nn.KeyQueue(12, 4))
    for call, error, message in [
        (lambda: nt_xent(x, q), ValueError, "second must have shape [6, 4] like first"),
        (lambda: nt_xent(x, x, q[:, :2]), ValueError, "negatives must have 4 columns like first"),
        (lambda: clip(x, x[:, :2]), ValueError, "texts must have shape [6, 4] like images"),
        (lambda: clip(x, x, exclude=y), TypeError, "exclude must be a torch.bool mask or None"),
        (lambda: clip(x, x, exclude=(x > 0)), ValueError, "exclude must have shape [6, 6]"),
        (lambda: supcon(x), ValueError, "labels must be given for embeddings [B, D]"),
        (lambda: supcon(x, y[:5]), ValueError, "labels must have shape [6] like the rows of"),
        (lambda: supcon(x, y, q), ValueError, "references and reference_labels must be given"),
        (lambda: supcon(x, y, exclude=y), ValueError, "exclude must be None without references"),
        (lambda: supcon(x[None, None], y), ValueError, "embeddings must have 2 or 3 dimensions"),
        (lambda: queued(x, x, own_keys=x), ValueError, "own_keys must be None with a queue"),
        (lambda: kd.nn.CLIPLoss(temperature=0.001), ValueError, "temperature must be at least"),
    ]:
        with pytest.raises(error) as raised:
            call()
        assert message in str(raised.value)


@pytest.mark.parametrize("make", [kd.nn.NTXentLoss, kd.nn.SupConLoss, kd.nn.CLIPLoss])
def test_they_print_their_options(make: Any) -> None:
    module: nn.Module = make(2.0, temperature=0.25)
    assert "weight=2, temperature=0.25" in repr(module)
