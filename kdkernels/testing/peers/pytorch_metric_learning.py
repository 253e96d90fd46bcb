# SPDX-License-Identifier: Apache-2.0
"""pytorch-metric-learning: a miner that returns indices, and a loss that gathers from a second
matrix of distances."""

from __future__ import annotations

from collections.abc import Callable

from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor

from kdkernels.testing.opinfo import Sample
from kdkernels.testing.peers import Peer

_REDUCERS = {"mean_nonzero": reducers.AvgNonZeroReducer, "mean": reducers.MeanReducer}
_MININGS = ("batch_hard", "batch_semihard", "batch_all")
_OPTIONS = {"mining", "margin", "soft", "distance", "normalize_embeddings", "reduction"}


def triplet_loss(sample: Sample) -> Callable[..., Tensor]:
    """The miner, if any, and `TripletMarginLoss` with the meaning of the sample's options.

    Raises:
        ValueError: The library has no such option.
    """
    options = {"mining": "batch_hard", "margin": 0.2, "soft": False, "reduction": "mean_nonzero"}
    options |= {"distance": "euclidean", "normalize_embeddings": True, **sample.kwargs}
    known = options["mining"] in _MININGS and options["reduction"] in _REDUCERS
    if not (known and set(options) <= _OPTIONS):
        raise ValueError(f"sample must have options that the library has, got {sample.kwargs}")
    if options["distance"] == "cosine":
        distance = distances.CosineSimilarity()
    else:
        power = 1 if options["distance"] == "euclidean" else 2
        normalize = options["normalize_embeddings"]
        distance = distances.LpDistance(normalize_embeddings=normalize, p=2, power=power)
    miner = {
        "batch_hard": miners.BatchHardMiner(distance=distance),
        "batch_semihard": miners.BatchEasyHardMiner("hard", "semihard", distance=distance),
        "batch_all": None,
    }[options["mining"]]
    loss = losses.TripletMarginLoss(
        margin=options["margin"],
        smooth_loss=options["soft"],
        distance=distance,
        reducer=_REDUCERS[options["reduction"]](),
    )

    def call(embeddings: Tensor, labels: Tensor) -> Tensor:
        return loss(embeddings, labels, None if miner is None else miner(embeddings, labels))

    return call


PEERS = {
    "triplet_loss": Peer(
        computes="The whole loss: a miner that returns indices, then TripletMarginLoss on a second "
        "matrix of distances; normalisation and gradient included.",
        function=triplet_loss,
    ),
    "triplet_loss_all": Peer(
        computes="The whole loss: TripletMarginLoss without a miner, over the indices of all "
        "triplets; normalisation and gradient included.",
        function=triplet_loss,
    ),
}
