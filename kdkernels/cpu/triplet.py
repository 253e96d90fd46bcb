# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/triplet/triplet_cpu.cpp."""

import torch

triplet_fwd = torch.ops.kdkernels_C.triplet_fwd.default
triplet_bwd = torch.ops.kdkernels_C.triplet_bwd.default
