# SPDX-License-Identifier: Apache-2.0
"""Sampled losses in torch by way of all products."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kdkernels.testing.opinfo import Sample
from kdkernels.testing.peers import Peer


def sampled_similarity(sample: Sample) -> Callable[..., Tensor]:
    def call(x: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
        return (x @ bank.mT).gather(1, indices)  # through [B, N]

    return call


PEERS = {
    "sampled_similarity": Peer(
        computes="Inner products with every row of the bank, of which those that are named are "
        "taken; gradient included.",
        function=sampled_similarity,
    )
}
