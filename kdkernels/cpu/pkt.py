# SPDX-License-Identifier: Apache-2.0
"""Launcher of csrc/pkt/pkt_cpu.cpp."""

import torch

pkt_fwd = torch.ops.kdkernels_C.pkt_fwd.default
