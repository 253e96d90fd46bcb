# SPDX-License-Identifier: Apache-2.0
"""Mean and median of random projections over a data set, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels.nn._raw import raw_bytes

ROWS = 8192  # of features projected at a time
# Of a projection: itself, the copy that is partitioned, and the indices that go with it.
MEDIAN_BYTES = 8


def mean_projection(
    features: Any,  # [n, D], or batches of it
    weight: Tensor,  # [N, D]
) -> Tensor:  # [N]
    """Mean over the rows, which is the projection of the mean row, summed in fp64."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    count = 0
    for batch in _batches(features, weight.shape[1]):
        total += batch.to(weight.device).sum(0, dtype=torch.float64)
        count += len(batch)
    return (weight.double() @ (total / _not_empty(count))).to(weight.dtype)


def median_projection(
    features: Any,  # [n, D], or batches of it
    weight: Tensor,  # [N, D]
    memory_bytes: int,
) -> Tensor:  # [N]
    """Exact lower median over the rows, as torch.median, a block of directions at a time.

    All n x N projections would not fit, so features are read once per block. Batches may come only
    once: they wait in a temporary file, which holds n x D numbers.
    """
    with ExitStack() as stack:
        given = features if isinstance(features, Tensor) else _spooled(features, weight, stack)
        (rows,) = _batches(given, weight.shape[1])
        n = _not_empty(len(rows))
        per_direction = n * (2 * weight.itemsize + MEDIAN_BYTES)
        block = max(1, min(len(weight), memory_bytes // per_direction))
        medians = []
        for directions in weight.split(block):
            projections = directions.new_empty((len(directions), n))
            for first in range(0, n, ROWS):
                part = rows[first : first + ROWS].to(weight)
                projections[:, first : first + ROWS] = directions @ part.T
            medians.append(projections.median(1).values)
        return torch.cat(medians)


def _batches(features: Any, D: int) -> Iterable[Tensor]:
    """Checked and without a graph."""
    for batch in [features] if isinstance(features, Tensor) else features:
        _checks.features("features", batch)
        if batch.flatten(1).shape[1] != D:
            raise ValueError(
                f"features must have {D} columns like hash_weight, got {batch.flatten(1).shape[1]}"
            )
        yield batch.detach().flatten(1)


def _not_empty(count: int) -> int:
    if count == 0:
        raise ValueError("features must have at least 1 row, got none")
    return count


def _spooled(features: Iterable[Tensor], weight: Tensor, stack: ExitStack) -> Tensor:  # [n, D]
    """All batches in one memory-mapped temporary file, in the dtype of the weight."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdkernels-")))
    path, count = folder / "features", 0
    with path.open("wb") as file:
        for batch in _batches(features, weight.shape[1]):
            plain = batch.to("cpu", weight.dtype).contiguous()
            file.write(raw_bytes(plain))
            count += plain.numel()
    if count == 0:
        return weight.new_empty((0, weight.shape[1]), device="cpu")
    mapped = torch.from_file(str(path), shared=False, size=count, dtype=weight.dtype)
    return mapped.view(-1, weight.shape[1])
