# SPDX-License-Identifier: Apache-2.0
"""torchmetrics: matrices of similarities and distances in torch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torchmetrics import functional

from kdkernels.testing.opinfo import Sample
from kdkernels.testing.peers import Peer, one_side, without_metrics

_LACKS = without_metrics("sqeuclidean", "rbf")
_FUNCTIONS = {
    "dot": functional.pairwise_linear_similarity,
    "cosine": functional.pairwise_cosine_similarity,
    "euclidean": functional.pairwise_euclidean_distance,
}


def pairwise(sample: Sample) -> Callable[..., Tensor]:
    """The matrix of the sample's metric.

    Raises:
        ValueError: The library has no such matrix.
    """
    metric, _ = one_side(sample, _LACKS)
    # its default would zero the diagonal of similarities too
    return lambda x: _FUNCTIONS[metric](x, zero_diagonal=metric == "euclidean")


PEERS = {
    "pairwise": Peer(
        computes="The whole matrix of rows with themselves (pairwise_*, reduction None), Euclidean "
        "distances by way of fp64; gradient included.",
        function=pairwise,
        lacks=_LACKS,
    )
}
