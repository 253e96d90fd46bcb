# SPDX-License-Identifier: Apache-2.0
"""Launcher of csrc/correlation/correlation_cpu.cpp."""

import torch

correlation_fwd = torch.ops.kdkernels_C.correlation_fwd.default
