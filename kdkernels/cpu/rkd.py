# SPDX-License-Identifier: Apache-2.0
"""Launcher of csrc/rkd/rkd_cpu.cpp."""

import torch

rkd_fwd = torch.ops.kdkernels_C.rkd_fwd.default
