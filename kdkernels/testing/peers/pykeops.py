# SPDX-License-Identifier: Apache-2.0
"""KeOps: reductions over a symbolic matrix of distances, by C++ that it generates and compiles at
first use and keeps in its own cache folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.testing.opinfo import Sample
from kdkernels.testing.peers import Peer, one_side, without_metrics

_DEFAULTS = {"mining": "batch_hard", "distance": "euclidean", "soft": False}
_DEFAULTS |= {"reduction": "mean_nonzero", "normalize_embeddings": True}


def why_not() -> str | None:
    """What this machine lacks: KeOps takes CXX or else g++."""
    if any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++")):
        return None
    return "pykeops needs a C++ compiler"


def mine(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the farthest row of its label, the nearest row of another, whether there are both), for each
    row, in one reduction."""
    x = x.detach()  # [B, D]
    # numbers from 0, since KeOps compares them in the dtype of x
    classes = labels.unique(return_inverse=True)[1]
    rows = torch.arange(len(x))
    # it prints on standard output, which may carry JSON
    with contextlib.redirect_stdout(sys.stderr):
        from pykeops.torch import LazyTensor

        def compared(column: Tensor) -> Any:  # [B] -> symbolic [B, B, 1]
            column = column.to(x.dtype)
            return (LazyTensor(column[:, None, None]) - LazyTensor(column[None, :, None])).abs()

        d2 = LazyTensor(x[:, None, :]).sqdist(LazyTensor(x[None, :, :]))
        differs = (compared(classes) - 0.5).sign()  # -1 or 1
        itself = (0.5 - compared(rows)).step()  # 1 or 0
        out = torch.finfo(x.dtype).max / 8  # more than any distance; three times it is finite
        # both want the smallest d2 * differs: among other labels, and (-d2) in its own but itself
        excluded = (out * (1 - differs)).concat(out * (1 + differs) + out * itself)
        winners = (d2 * differs + excluded).argmin(dim=1)  # [B, 2]
    negative, positive = winners.unbind(1)
    valid = (classes[positive] == classes) & (positive != rows) & (classes[negative] != classes)
    return positive, negative, valid


def triplet_loss(sample: Sample) -> Callable[..., Tensor]:
    """Mining by KeOps, and the loss of the mined triplets in torch.

    Raises:
        ValueError: An option that is not written here.
    """
    options = {**_DEFAULTS, "margin": 0.2, **sample.kwargs}
    margin = options.pop("margin")
    if options != _DEFAULTS:
        raise ValueError(f"sample must have no option but margin, got {sample.kwargs}")

    def call(embeddings: Tensor, labels: Tensor) -> Tensor:
        x = F.normalize(embeddings, dim=-1)
        positive, negative, valid = mine(x, labels)
        d_ap, d_an = ((x - x[rows]).norm(dim=1) for rows in (positive, negative))
        losses = torch.where(valid, (d_ap - d_an + margin).relu(), 0.0)
        return losses.sum() / (losses > 0).sum().clamp_min(1)

    return call


_LACKS = without_metrics("dot", "cosine")


def row_sums(sample: Sample) -> Callable[..., Tensor]:
    """Sums over the rows of the matrix of the sample's metric.

    Raises:
        ValueError: The sample is not one matrix, or its metric is not written here.
    """
    metric, gamma = one_side(sample, _LACKS)

    def call(x: Tensor) -> Tensor:
        x = x.detach()
        with contextlib.redirect_stdout(sys.stderr):
            from pykeops.torch import LazyTensor

            d2 = LazyTensor(x[:, None, :]).sqdist(LazyTensor(x[None, :, :]))
            values = {"euclidean": d2.sqrt, "sqeuclidean": lambda: d2}
            values |= {"rbf": lambda: (-gamma * d2).exp()}
            return values[metric]().sum(dim=1)[:, 0]

    return call


PEERS = {
    "pairwise": Peer(
        computes="Sums of the rows of the matrix, by one reduction over symbolic distances "
        "(LazyTensor): KeOps writes no matrix; compiled before the clock starts, no gradient.",
        function=row_sums,
        whole=False,
        dtypes=(torch.float32, torch.float64),
        devices=("cpu",),
        most_work=2**33,
        why_not=why_not,
        lacks=_LACKS,
    ),
    "triplet_loss": Peer(
        computes="The whole loss: both winners of each row by one argmin over symbolic distances "
        "(LazyTensor), compiled before the clock starts; normalisation, distances of the winners "
        "and gradient by torch.",
        function=triplet_loss,
        dtypes=(torch.float32, torch.float64),
        devices=("cpu",),
        most_work=2**33,
        why_not=why_not,
    ),
}
