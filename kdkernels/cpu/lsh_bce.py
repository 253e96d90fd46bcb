# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/lsh_bce/lsh_bce_cpu.cpp."""

import torch

lsh_bce_encode = torch.ops.kdkernels_C.lsh_bce_encode.default
lsh_bce_fwd = torch.ops.kdkernels_C.lsh_bce_fwd.default
lsh_bce_bwd = torch.ops.kdkernels_C.lsh_bce_bwd.default
