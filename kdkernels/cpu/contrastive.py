# SPDX-License-Identifier: Apache-2.0
"""Launcher of csrc/contrastive/contrastive_cpu.cpp."""

import torch

contrastive_fwd = torch.ops.kdkernels_C.contrastive_fwd.default
