# SPDX-License-Identifier: Apache-2.0
"""Launcher of csrc/triplet_all/triplet_all_cpu.cpp."""

import torch

triplet_all_fwd = torch.ops.kdkernels_C.triplet_all_fwd.default
