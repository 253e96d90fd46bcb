# SPDX-License-Identifier: Apache-2.0
"""Fast kernels for knowledge-distillation and metric-learning losses at large batch."""

from kdkernels import nn, reference
from kdkernels._dispatch import BackendUnavailableError, explain, use_backend
from kdkernels._mined_triplets import MinedTriplets
from kdkernels._version import __version__
from kdkernels.ops.contrastive import contrastive_loss
from kdkernels.ops.correlation import correlation
from kdkernels.ops.gram_mse import gram_mse
from kdkernels.ops.info_nce import info_nce
from kdkernels.ops.lsh_bce import lsh_bce, lsh_encode
from kdkernels.ops.pairwise import pairwise
from kdkernels.ops.pkt import pkt
from kdkernels.ops.relational_kl import relational_kl
from kdkernels.ops.rkd import rkd_angle, rkd_distance
from kdkernels.ops.sampled_similarity import sampled_similarity
from kdkernels.ops.triplet import mine_triplets
from kdkernels.ops.triplet_distillation import triplet_distillation
from kdkernels.ops.triplet_loss import triplet_loss

__all__ = [
    "BackendUnavailableError",
    "MinedTriplets",
    "__version__",
    "contrastive_loss",
    "correlation",
    "explain",
    "gram_mse",
    "info_nce",
    "lsh_bce",
    "lsh_encode",
    "mine_triplets",
    "nn",
    "pairwise",
    "pkt",
    "reference",
    "relational_kl",
    "rkd_angle",
    "rkd_distance",
    "sampled_similarity",
    "triplet_distillation",
    "triplet_loss",
    "use_backend",
]
