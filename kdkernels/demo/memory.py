# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one step of a loss on the CPU; `measure.peak_bytes` runs it in a process of its
own.

The system keeps only the highest resident size so far, and importing torch may have peaked above
what is held now. So before the step, memory is taken and touched until that record starts to rise:
from there on every further byte shows.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

from kdkernels.demo.measure import Batch, step_of

_BLOCK_BYTES = 256 * 1024
# enough to load libraries and start threads, too few to leave buffers of the real size behind
_WARM_UP_ROWS = 64
_M_MMAP_THRESHOLD = -3  # malloc.h
_BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def highest_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_PER_UNIT


def fill_to_the_record() -> list[bytearray]:
    """Memory that has to stay alive while something is measured."""
    record = highest_resident_bytes()
    blocks = []
    while highest_resident_bytes() < record + 4 * _BLOCK_BYTES:
        block = bytearray(_BLOCK_BYTES)
        block[::4096] = b"\x01" * len(block[::4096])  # untouched pages are not resident
        blocks.append(block)
    return blocks


def peak_bytes(path: Path, threads: int) -> int:
    """Of the step whose criterion and batch are in a file."""
    # large blocks are mapped and given back one by one: otherwise glibc keeps freed ones, and the
    # peak holds a matrix more or less depending on how they happen to fit
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
    torch.set_num_threads(threads)
    # the criterion is a module, hence more than weights; the parent has just written it
    criterion, tensors = torch.load(path, weights_only=False)
    step_of(criterion, Batch.of(tensors, _WARM_UP_ROWS))()
    step = step_of(criterion, Batch.of(tensors))
    ballast = fill_to_the_record()
    before = highest_resident_bytes()
    step()
    peak = highest_resident_bytes() - before
    del ballast
    return peak
