# SPDX-License-Identifier: Apache-2.0
"""A small data set, a teacher and a criterion, of which the tests of code caches make files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.nn import LSHFeatureMimickingLoss

SAMPLES, DIM, BITS = 23, 6, 21


def images() -> Tensor:
    return torch.randn(SAMPLES, 3, 4, generator=torch.Generator().manual_seed(0))


def make_teacher(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, DIM), nn.Dropout(0.5))


def make_criterion(seed: int = 2, **options: Any) -> LSHFeatureMimickingLoss:
    generator = torch.Generator().manual_seed(seed)
    options = {"std": 0.5, "bias": "zero", "form": "lsh", "hash_bits": BITS, **options}
    return LSHFeatureMimickingLoss(DIM, generator=generator, **options)


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images(), torch.arange(SAMPLES)), batch_size=5, **options)
