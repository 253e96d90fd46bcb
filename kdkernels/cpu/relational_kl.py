# SPDX-License-Identifier: Apache-2.0
"""Launchers of csrc/relational_kl/relational_kl_cpu.cpp."""

import torch

relational_kl_fwd = torch.ops.kdkernels_C.relational_kl_fwd.default
relational_kl_bwd = torch.ops.kdkernels_C.relational_kl_bwd.default
