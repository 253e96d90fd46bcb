# SPDX-License-Identifier: Apache-2.0
"""scikit-learn: exact search, a yardstick for the mining alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from kdkernels.testing.opinfo import Sample
from kdkernels.testing.peers import Peer, unit_rows


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


PEERS = {
    "triplet_loss": Peer(
        computes="Exact 2 nearest rows of each row among all rows (NearestNeighbors, brute force), "
        "less the row itself: no labels, positives, loss or gradient; rows are normalised before "
        "the clock starts.",
        function=nearest,
        whole=False,
        prepare=unit_rows,
        dtypes=(torch.float32, torch.float64),
        devices=("cpu",),
    )
}
