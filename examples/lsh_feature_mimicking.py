# SPDX-License-Identifier: Apache-2.0
"""Feature mimicking through hash bits: the teacher runs over the data set once, and the student
learns from 1 bit per random direction and sample."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import kdkernels as kd

SAMPLES, BATCH, EPOCHS, WIDTH = 4096, 512, 5, 64


class Signals(Dataset):
    """Samples with their index, by which their codes are found."""

    def __init__(self) -> None:
        self.signals = torch.randn(SAMPLES, 40).cumsum(1) / 6

    def __len__(self) -> int:
        return len(self.signals)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.signals[index], index


def network(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(40, hidden), nn.ReLU(), nn.Linear(hidden, WIDTH))


def main() -> None:
    torch.manual_seed(0)
    data, teacher, student = Signals(), network(512), network(32)
    criterion = kd.nn.LSHFeatureMimickingLoss(WIDTH, form="lsh", std=0.2)

    # Done once: fit the bias that balances every bit, and store the codes of all samples.
    in_order = DataLoader(data, BATCH)
    with torch.no_grad():
        criterion.fit_bias(teacher(signals) for signals, _ in in_order)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.codes"
        kd.nn.encode_dataset(teacher, in_order, criterion, path)
        print(f"{SAMPLES} samples, {criterion.hash_bits} bits each: {path.stat().st_size} bytes")

        # The epochs need no teacher.
        cache = kd.nn.CodeCache(path, criterion=criterion, teacher=teacher, samples=len(data))
        optimiser = torch.optim.Adam(student.parameters(), 3e-3)
        for epoch in range(EPOCHS):
            for signals, index in DataLoader(data, BATCH, shuffle=True):
                loss = criterion(student(signals), codes=cache[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            print(
                f"epoch {epoch}: loss {loss.item():.3f}, {agreement(student, data, cache):.1%} bits"
            )


def agreement(student: nn.Module, data: Signals, cache: kd.nn.CodeCache) -> float:
    """Share of bits that student and teacher have in common."""
    codes = kd.lsh_encode(student(data.signals), cache.weight, cache.bias)
    different = (codes ^ cache.codes).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return 1 - different.sum().item() / (len(cache) * len(cache.bias))


if __name__ == "__main__":
    main()
