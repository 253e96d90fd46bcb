# SPDX-License-Identifier: Apache-2.0
"""Similarity-preserving distillation in your own training loop: three additions, marked 1 to 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd

BATCH, CLASSES, STEPS = 2048, 10, 20


class Network(nn.Module):
    """Returns logits and the last map, which the loss compares."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, width, 5, stride=4),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, stride=3),
            nn.ReLU(),
        )
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)  # x is [B, 1, 40], the features are [B, width, 3]
        return self.head(features.flatten(1)), features


def main() -> None:
    torch.manual_seed(0)
    # a teacher of yours would be trained
    teacher, student = Network(width=64).eval(), Network(width=16)
    x, labels = torch.randn(BATCH, 1, 40), torch.randint(CLASSES, (BATCH,))
    # the first call gives the lazy head its size
    student(x[:2])

    # 1. the paper's form and weight
    similarity = kd.nn.SimilarityPreservingLoss()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(STEPS):
        # 2. the teacher's map of the same batch, whose width may differ
        with torch.no_grad():
            _, teacher_features = teacher(x)
        logits, features = student(x)
        # 3. the student's loss, and beside it the distance of the similarities
        loss = F.cross_entropy(logits, labels) + similarity(features, teacher_features)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 5 == 0 or step == STEPS - 1:
            print(f"step {step:2d}  loss {loss.item():.4f}")

    print(kd.explain("gram_mse", features.flatten(1), teacher_features.flatten(1)))


if __name__ == "__main__":
    main()
