# SPDX-License-Identifier: Apache-2.0
"""Makes every Python process of the dry run of benchmarks/run_on_gpu.sh believe in a GPU.

Python imports this when it starts, since the test puts this folder on PYTHONPATH.
"""

import os
import sys

# Kernels are compiled and launched through Triton's own path there, by a driver that launches
# nothing; elsewhere the interpreter runs them, so that values are right.
COMPILED = ("kdkernels.testing.warm", "benchmarks/sweep_triton.py")

# These import no torch, which takes seconds.
WITHOUT_TORCH = ("benchmarks/gpu_libraries.py", "benchmarks/counters.py")

compiled = any(name in sys.orig_argv for name in COMPILED)
if not compiled:
    os.environ["TRITON_INTERPRET"] = "1"
if not any(name in sys.orig_argv for name in WITHOUT_TORCH):
    import pretended_gpu

    pretended_gpu.use(compiled)
