# SPDX-License-Identifier: Apache-2.0
"""Contrastive representation distillation: its loss by exponentials, its memories, its state."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from modules import unit
from torch import Tensor

import kdkernels as kd
from kdkernels.ops.noise_contrastive import move_rows, noise_contrastive
from kdkernels.reference import _noise_contrastive as reference

CRD = kd.nn.CRDLoss
STATE = {"student_memory", "teacher_memory", "log_partitions"}
UNSET = torch.tensor(torch.nan, dtype=torch.float64)


def rows(B: int = 6, D: int = 4) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64)


def module(**options: Any) -> kd.nn.CRDLoss:
    return CRD(4, 5, 40, **{"dim": 3, "num_negatives": 7, **options}).double()


def scores_by_hand(x: Tensor, memory: Tensor, places: Tensor) -> Tensor:  # [B, 1 + m]
    pairs = zip(x, places, strict=True)
    return torch.stack([torch.stack([(xi * memory[j]).sum() for j in of]) for xi, of in pairs])


def loss_by_hand(
    x: Tensor, memory: Tensor, places: Tensor, Z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Entry by entry as published, and the partition."""
    o = torch.exp(scores_by_hand(x, memory, places) / 0.07)
    Z = o.detach().mean() * len(memory) if Z is None else Z
    o, m, total = o / Z, places.shape[1] - 1, 0.0
    noise = m * (1 / len(memory))
    for of in o:
        total = total + torch.log(of[0] / (of[0] + noise + 1e-7))
        total = total + sum(torch.log(noise / (one + noise + 1e-7)) for one in of[1:])
    return -total / len(x), Z


def test_several_steps_are_those_of_the_formula() -> None:
    criterion = module(weight=2.5)
    layers = (criterion.embed_student, criterion.embed_teacher)
    memories = [criterion.student_memory.clone(), criterion.teacher_memory.clone()]
    Z: list[Tensor | None] = [None, None]
    for step in range(3):
        student, teacher = rows().requires_grad_(), rows(6, 5)
        index, negatives = torch.randperm(40)[:6], torch.randint(40, (6, 7))
        places = torch.cat([index[:, None], negatives], 1)
        s, t = (unit(layer(x)) for layer, x in zip(layers, (student, teacher), strict=True))
        of_s, Z[0] = loss_by_hand(s, memories[1], places, Z[0])
        of_t, Z[1] = loss_by_hand(t, memories[0], places, Z[1])
        expected = 2.5 * (of_s + of_t)
        loss = criterion(student, teacher, index, negatives)
        torch.testing.assert_close(loss, expected)
        sources = [student, *criterion.parameters()]
        got = torch.autograd.grad(loss, sources)
        for g, w in zip(got, torch.autograd.grad(expected, sources), strict=True):
            torch.testing.assert_close(g, w)
            assert w.ne(0).any(), step
        for memory, new in zip(memories, (s, t), strict=True):
            memory[index] = unit(0.5 * memory[index] + 0.5 * new.detach())
        torch.testing.assert_close(criterion.student_memory, memories[0])
        torch.testing.assert_close(criterion.teacher_memory, memories[1])
        torch.testing.assert_close(criterion.log_partitions.exp(), torch.stack(Z))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_noise_contrastive_is_the_definition(backend: str) -> None:
    x, bank, places = rows(5, 9).requires_grad_(), rows(30, 9), torch.randint(30, (5, 12))
    for partition in (None, torch.tensor(3.7, dtype=torch.float64)):
        log = UNSET if partition is None else partition.log()
        result = noise_contrastive(x, bank, places, log, temperature=0.5, backend=backend)
        expected = reference.noise_contrastive(x, bank, places, partition, temperature=0.5)
        torch.testing.assert_close(result.loss, expected)
        (wanted,) = torch.autograd.grad(expected, x)
        torch.testing.assert_close(torch.autograd.grad(result.loss, x)[0], wanted)
        if partition is not None:
            assert torch.equal(result.log_partition, log)
        assert not result.log_partition.requires_grad


def test_far_scores_neither_overflow_nor_underflow() -> None:
    x, bank = torch.full((2, 1), 60.0).requires_grad_(), torch.tensor([[1.0], [-1.0], [0.0]])
    log = torch.tensor(0.0)
    result = noise_contrastive(x, bank, torch.tensor([[0, 1], [1, 0]]), log)
    far, noise = 60 / 0.07, math.log(1 / 3 + 1e-7)
    # a row that finds its own, and one that does not, each with the cost of its other
    found = 0.0 + noise - math.log(1 / 3)
    lost = (noise + far) + (far - math.log(1 / 3))
    expected = torch.tensor((found + lost) / 2)
    torch.testing.assert_close(result.loss, expected)
    result.loss.backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0], [1 / 0.07]]))


def test_an_empty_batch_costs_nothing_and_sets_nothing() -> None:
    x, places = rows(0, 9).requires_grad_(), torch.zeros(0, 3, dtype=torch.int64)
    result = noise_contrastive(x, rows(30, 9), places, UNSET)
    result.loss.backward()
    assert result.loss.item() == 0
    assert result.log_partition.isnan()
    assert x.grad.shape == (0, 9)
    criterion = module()
    before = copy.deepcopy(criterion.state_dict())
    criterion(rows(0), rows(0, 5), torch.zeros(0, dtype=torch.int64))
    for name, value in criterion.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


def test_of_a_sample_that_occurs_twice_the_last_row_is_kept() -> None:
    bank, new = rows(9, 3), rows(5, 3)
    before = bank.clone()
    move_rows(bank, torch.tensor([4, 2, 4, 7, 2]), new, 0.25)
    for place, of in {4: 2, 2: 4, 7: 3}.items():
        moved = 0.25 * before[place] + 0.75 * new[of]
        torch.testing.assert_close(bank[place], moved / moved.norm())
    others = [0, 1, 3, 5, 6, 8]
    assert torch.equal(bank[others], before[others])


def test_evaluation_changes_nothing() -> None:
    criterion = module().eval()
    before = copy.deepcopy(criterion.state_dict())
    assert criterion(rows(), rows(6, 5), torch.arange(6)).isfinite()
    for name, value in criterion.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True)


def test_negatives_come_from_the_whole_data_set() -> None:
    drawn = module(num_negatives=400).sample(torch.arange(6))
    assert drawn.shape == (6, 400)
    assert drawn.unique().tolist() == list(range(40))
    again = [module().sample(torch.arange(6), torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)


def test_memories_start_with_rows_of_norm_one_on_average() -> None:
    criterion = CRD(4, 5, 200, dim=64)
    for memory in (criterion.student_memory, criterion.teacher_memory):
        assert memory.abs().max() <= math.sqrt(3 / 64)
        assert abs(memory.pow(2).sum(1).mean().item() - 1) < 0.05
    assert criterion.log_partitions.isnan().all()


def test_state_goes_on_after_a_round_trip_and_a_copy() -> None:
    first = module()
    student, teacher, index = rows(), rows(6, 5), torch.arange(6)
    first(student, teacher, index)
    other, third = module(), copy.deepcopy(first)
    assert set(first.state_dict()) - {name for name, _ in first.named_parameters()} == STATE
    other.load_state_dict(first.state_dict())
    negatives = first.sample(index)
    values = [one(student, teacher, index, negatives) for one in (first, other, third)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    for name, value in first.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_half_precision_under_autocast() -> None:
    criterion = module().float()
    student = rows().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(student, rows(6, 5).float(), torch.arange(6))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.isfinite().all()


def test_a_step_compiles_into_one_graph() -> None:
    criterion = module()
    eager = copy.deepcopy(criterion)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        student, teacher = rows().requires_grad_(), rows(6, 5)
        index = torch.randperm(40)[:6]
        negatives = criterion.sample(index)
        results = [call(student, teacher, index, negatives) for call in (compiled, eager)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in results))
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(criterion.state_dict()[name], value)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((4, 5, 0), {}, ValueError, "num_samples must be from 1 to"),
        ((4, 5, 40), {"num_negatives": 0}, ValueError, "num_negatives must be from 1 to"),
        ((4, 5, 40), {"momentum": 1.5}, ValueError, "momentum must be from 0 to 1, got 1.5"),
        ((4, 5, 40), {"temperature": 0}, ValueError, "temperature must be a positive finite"),
        ((4, 5, 40), {"backend": "gpu"}, ValueError, "backend must be one of"),
        ((4, 5, 40, -1), {}, ValueError, "weight must be a finite number"),
    ],
)
def test_bad_options(
    args: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        CRD(*args, **options)
    assert message in str(raised.value)


INDEX, OTHERS = torch.arange(6), torch.zeros(6, 7, dtype=torch.int64)


@pytest.mark.parametrize(
    ("index", "negatives", "error", "message"),
    [
        (INDEX[:5], OTHERS, ValueError, "index must have shape [6] like the rows of student"),
        (INDEX.float(), OTHERS, TypeError, "index must be an integer tensor, got torch.float32"),
        (INDEX + 35, OTHERS, ValueError, "index must be from 0 to 39, got 40"),
        (INDEX, OTHERS[:, :6], ValueError, "negatives must have shape [6, 7], got [6, 6]"),
        (INDEX, OTHERS - 1, ValueError, "negatives must be from 0 to 39, got -1"),
        (INDEX, OTHERS > 0, TypeError, "negatives must be an integer tensor, got torch.bool"),
        (INDEX, [0], TypeError, "negatives must be a torch.Tensor, got list"),
    ],
)
def test_bad_indices(index: Any, negatives: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        module()(rows(), rows(6, 5), index, negatives)
    assert message in str(raised.value)


def test_bad_arguments_of_noise_contrastive() -> None:
    x, bank, places = rows(5, 9), rows(30, 9), torch.zeros(5, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match="indices must have at least 2 columns"):
        noise_contrastive(x, bank, places[:, :1], UNSET)
    with pytest.raises(ValueError, match="log_partition must have no dimension"):
        noise_contrastive(x, bank, places, UNSET[None])
    with pytest.raises(ValueError, match="temperature must be a positive"):
        noise_contrastive(x, bank, places, UNSET, temperature=0.0)
