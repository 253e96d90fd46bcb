# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one step of a loss on the CPU; `measure.peak_bytes` runs it in a process of its
own.

    python -m kdkernels.demo.memory STEP.pt THREADS

The system keeps only the highest resident size so far, and importing torch may have peaked above
what is held now. So before the step, memory is taken and touched until that record starts to rise:
from there on every further byte shows.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence

import torch

from kdkernels.demo.measure import Batch, step_of

_BLOCK_BYTES = 256 * 1024
# enough to load libraries and start threads, too few to leave buffers of the real size behind
_WARM_UP_ROWS = 64
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


def main(argv: Sequence[str]) -> None:
    path, threads = argv
    torch.set_num_threads(int(threads))
    # the criterion is a module, hence more than weights; the parent has just written it
    criterion, tensors = torch.load(path, weights_only=False)
    step_of(criterion, Batch.of(tensors, _WARM_UP_ROWS))()
    step = step_of(criterion, Batch.of(tensors))
    ballast = fill_to_the_record()
    before = highest_resident_bytes()
    step()
    peak = highest_resident_bytes() - before
    print(json.dumps({"peak_bytes": peak, "ballast_bytes": len(ballast) * _BLOCK_BYTES}))


if __name__ == "__main__":
    main(sys.argv[1:])
