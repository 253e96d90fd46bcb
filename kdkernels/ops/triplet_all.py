# SPDX-License-Identifier: Apache-2.0
"""triplet_all: the sum of the losses of several triplets per anchor, and its derivatives.

Each distance of an anchor to a negative is compared with the distances to its positives plus the
margin, so the triplets are never written down, nor B x M distances. Derivation:
docs/ops/triplet_all.md.
"""

from __future__ import annotations

from kdkernels._library import define_operator
from kdkernels.ops._labelled import summed_fake

# negatives="all": each positive of an anchor with each negative. "semihard": each positive with the
# nearest negative strictly beyond it, or where there is none with the farthest.
# `exclude` [B] int64 names one reference per anchor that is in none of its triplets, or none by -1.
# Results of the operator, the same for every backend; fp64 for fp64 inputs, else fp32:
#   total        []      sum of max(u, 0), or of log(1 + e^u) if soft, with
#                        u = d(anchor, positive) - d(anchor, negative) + margin
#   nonzero      [] int64  triplets with a loss above 0
#   valid        [] int64  triplets
#   dembeddings  [B, D]  derivative of `total` by the rows as given; [0] unless needed
#   dreferences  [M, D]  likewise; [0] with `in_batch`, where the references are the embeddings
# `normalize` is that of ops/triplet.py. Distances are NaN as there; a triplet with one of them
# makes `total` NaN.
triplet_all_fwd = define_operator(
    "triplet_all",
    "fwd",
    "(Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels, bool in_batch, "
    "Tensor? exclude, bool normalize, str negatives, float margin, bool soft, str distance, "
    "bool need_embeddings, bool need_references, str backend) -> "
    "(Tensor total, Tensor nonzero, Tensor valid, Tensor dembeddings, Tensor dreferences)",
    summed_fake(counts=2),
)
