# SPDX-License-Identifier: Apache-2.0
"""faiss-cpu: exact search, a yardstick for the mining alone."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import torch
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
        x = embeddings.detach().numpy()
        _, rows = faiss.knn(x, x, 2)  # [B, 2]; the first is the row itself
        return torch.from_numpy(rows)[:, 1]

    return call


PEERS = {
    "triplet_loss": Peer(
        computes="Exact 2 nearest rows of each row among all rows (faiss.knn), the first being the "
        "row itself: no labels, positives, loss or gradient; rows are normalised before the clock "
        "starts.",
        function=nearest,
        whole=False,
        prepare=unit_rows,
        dtypes=(torch.float32,),
        devices=("cpu",),
    )
}
