# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/gram_mse/gram_mse_cpu.cpp."""

import torch

gram_mse_fwd = torch.ops.kdkernels_C.gram_mse_fwd.default
gram_mse_bwd = torch.ops.kdkernels_C.gram_mse_bwd.default
