# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one step of a loss on the CPU; `measure.peak_bytes` runs it in a process of its
own."""

from __future__ import annotations

from pathlib import Path

import torch

from kdkernels.demo.measure import Batch, step_of
from kdkernels.testing import resident

# enough to load libraries and start threads, too few to leave buffers of the real size behind
_WARM_UP_ROWS = 64


def peak_bytes(path: Path, threads: int) -> int:
    """Of the step whose criterion and batch are in a file."""
    torch.set_num_threads(threads)
    # the criterion is a module, hence more than weights; the parent has just written it
    criterion, tensors = torch.load(path, weights_only=False)
    step_of(criterion, Batch.of(tensors, _WARM_UP_ROWS))()
    step = step_of(criterion, Batch.of(tensors))
    return resident.extra_bytes(step)
