# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one step of a loss on the CPU; `measure.peak_bytes` runs it in a process of its
own.

    python -m kdkernels.demo.memory STEP.pt THREADS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from kdkernels.demo.measure import Batch, step_of
from kdkernels.testing import resident

# enough to load libraries and start threads, too few to leave buffers of the real size behind
_WARM_UP_ROWS = 64


def main(argv: Sequence[str]) -> None:
    path, threads = argv
    torch.set_num_threads(int(threads))
    # the criterion is a module, hence more than weights; the parent has just written it
    criterion, tensors = torch.load(path, weights_only=False)
    step_of(criterion, Batch.of(tensors, _WARM_UP_ROWS))()
    step = step_of(criterion, Batch.of(tensors))
    print(json.dumps({"peak_bytes": resident.extra_bytes(step)}))


if __name__ == "__main__":
    main(sys.argv[1:])
