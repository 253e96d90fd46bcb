# SPDX-License-Identifier: Apache-2.0
"""Trains the teacher and the students; all students from the same weights on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.demo.data import Data
from kdkernels.demo.losses import Criterion
from kdkernels.demo.models import EVALUATION_BATCH, ConvNet, Outputs

LEARNING_RATE = 1e-2
WEIGHT_DECAY = 1e-2

# Of the network's outputs on the training samples with the given indices
Loss = Callable[[Outputs, Tensor], Tensor]


@dataclass
class Curves:
    """Of one training, one value per epoch."""

    loss: list[float] = field(default_factory=list)  # mean over the steps of the epoch
    accuracy: list[float] = field(default_factory=list)  # on the test set, after the epoch
    # of hash bits on the test set, after the epoch; empty for a criterion without hash bits
    agreement: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train_teacher(
    model: ConvNet,
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    after_epoch: Callable[[int, Curves], None],
) -> Curves:
    """Cross-entropy only."""

    def loss(outputs: Outputs, index: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, data.y[index])

    return _train(model, None, loss, data, epochs, batch_size, seed, after_epoch)


def train_student(
    model: ConvNet,
    criterion: Criterion | None,
    teacher: Outputs,
    data: Data,
    *,
    cross_entropy_weight: float,
    epochs: int,
    batch_size: int,
    seed: int,
    after_epoch: Callable[[int, Curves], None],
) -> Curves:
    """`teacher`: outputs on the whole training set, which do not change without augmentation."""

    def loss(outputs: Outputs, index: Tensor) -> Tensor:
        labels = data.y[index]
        found = cross_entropy_weight * F.cross_entropy(outputs.logits, labels)
        if criterion is None:
            return found
        return found + criterion(outputs, teacher[index], labels, index)

    return _train(model, criterion, loss, data, epochs, batch_size, seed, after_epoch)


def _train(
    model: ConvNet,
    criterion: Criterion | None,
    loss_of: Loss,
    data: Data,
    epochs: int,
    batch_size: int,
    seed: int,
    after_epoch: Callable[[int, Curves], None],
) -> Curves:
    """AdamW on a one-cycle schedule; the last, smaller batch of an epoch is dropped."""
    steps = len(data.x) // batch_size
    generator = torch.Generator().manual_seed(seed)
    parameters = [*model.parameters(), *(() if criterion is None else criterion.parameters())]
    optimiser = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=epochs * steps
    )
    curves = Curves()
    begin = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(data.x), generator=generator).to(data.x.device)
        losses = []
        for index in order[: steps * batch_size].split(batch_size):
            loss = loss_of(model(data.x[index]), index)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        curves.loss.append(torch.stack(losses).mean().item())
        found = outputs(model, data.x_test)
        curves.accuracy.append(accuracy(found, data))
        agreement = None if criterion is None else criterion.agreement(found)
        if agreement is not None:
            curves.agreement.append(agreement)
        curves.seconds = time.perf_counter() - begin
        after_epoch(epoch, curves)
    return curves


def outputs(
    model: ConvNet,
    x: Tensor,  # [N, 1, ...]
) -> Outputs:
    """In evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        found = [model(part) for part in x.split(EVALUATION_BATCH)]
    return Outputs(
        torch.cat([part.features for part in found]), torch.cat([part.logits for part in found])
    )


def accuracy(found: Outputs, data: Data) -> float:
    """Share of the test set that is classified right, from the outputs on it."""
    return (found.logits.argmax(1) == data.y_test).float().mean().item()
