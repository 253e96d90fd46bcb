# SPDX-License-Identifier: Apache-2.0
"""scikit-learn: exact search, a yardstick for the mining alone, and matrices without gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.metrics import pairwise as matrices
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from kdkernels.testing.opinfo import Sample
from kdkernels.testing.peers import Peer, one_side, unit_rows, without_metrics


def nearest(sample: Sample) -> Callable[..., Tensor]:
    """The other row that is nearest to each row.

    Raises:
        ValueError: The sample searches elsewhere.
    """
    if "references" in sample.kwargs:
        raise ValueError(f"sample must have no references, got {sorted(sample.kwargs)}")

    def call(embeddings: Tensor, labels: Tensor) -> Tensor:
        search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(embeddings.detach().numpy())
        # of the fitted rows: searches for 2 and leaves out the row itself
        rows = search.kneighbors(return_distance=False)  # [B, 1]
        return torch.from_numpy(rows)[:, 0]

    return call


_LACKS = without_metrics()
_MATRICES = {
    "dot": matrices.linear_kernel,
    "cosine": matrices.cosine_similarity,
    "euclidean": matrices.euclidean_distances,
}


def pairwise(sample: Sample) -> Callable[..., Tensor]:
    """The matrix of the sample's metric.

    Raises:
        ValueError: The sample is not one matrix.
    """
    metric, gamma = one_side(sample, _LACKS)

    def call(x: Tensor) -> Tensor:
        rows = x.detach().numpy()
        if metric == "rbf":
            out = matrices.rbf_kernel(rows, gamma=gamma)
        elif metric == "sqeuclidean":
            out = matrices.euclidean_distances(rows, squared=True)
        else:
            out = _MATRICES[metric](rows)
        return torch.from_numpy(out)

    return call


PEERS = {
    "pairwise": Peer(
        computes="The matrix of rows with themselves (metrics.pairwise), fp32 Euclidean distances "
        "by way of chunks in fp64; no gradient.",
        function=pairwise,
        whole=False,
        dtypes=(torch.float32, torch.float64),
        devices=("cpu",),
    ),
    "triplet_loss": Peer(
        computes="Exact 2 nearest rows of each row among all rows (NearestNeighbors, brute force), "
        "less the row itself: no labels, positives, loss or gradient; rows are normalised before "
        "the clock starts.",
        function=nearest,
        whole=False,
        prepare=unit_rows,
        dtypes=(torch.float32, torch.float64),
        devices=("cpu",),
    ),
}
