# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/sampled_similarity/sampled_similarity_cpu.cpp."""

import torch

sampled_similarity_fwd = torch.ops.kdkernels_C.sampled_similarity_fwd.default
sampled_similarity_bwd = torch.ops.kdkernels_C.sampled_similarity_bwd.default
