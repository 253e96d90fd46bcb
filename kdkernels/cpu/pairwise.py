# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/pairwise/pairwise_cpu.cpp."""

import torch

pairwise_fwd = torch.ops.kdkernels_C.pairwise_fwd.default
pairwise_bwd = torch.ops.kdkernels_C.pairwise_bwd.default
