# SPDX-License-Identifier: Apache-2.0
"""The shapes that have a target on a GPU (benchmarks/targets.json), which `kdkernels bench --table`
measures."""

from __future__ import annotations

# (op, name of the shape, part of a step), those first that are most asked for
GPU_TABLE = (
    ("gram_mse", "layer4", "fwd_bwd"),
    ("gram_mse", "pooled_2048", "fwd_bwd"),
    ("gram_mse", "huge_512", "fwd_bwd"),
    ("info_nce", "huge_batch", "fwd_bwd"),
    ("lsh_bce", "pooled_2048", "fwd_bwd"),
    ("relational_kl", "seed_large", "fwd_bwd"),
    ("rkd_angle", "pooled_1024", "fwd_bwd"),
    ("triplet_loss", "pooled_32k", "fwd"),
    ("triplet_loss", "huge", "fwd"),
)
