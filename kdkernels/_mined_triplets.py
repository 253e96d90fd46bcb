# SPDX-License-Identifier: Apache-2.0
"""The result of mining, which the public function and its definition share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MinedTriplets(NamedTuple):
    """Triplets of rows: anchors and their labels' order is that of the batch; [K] each."""

    anchors: Tensor  # int64, rows of the embeddings
    positives: Tensor  # int64, rows of the references (the embeddings where there are none)
    negatives: Tensor  # int64, likewise
    d_ap: Tensor  # distance of anchor and positive
    d_an: Tensor  # distance of anchor and negative
