# SPDX-License-Identifier: Apache-2.0
"""How kernels are declared: which of their arguments a compilation may depend on.

Triton compiles a kernel anew where an integer is 1 or becomes a multiple of 16, and where a pointer
does, unless it is told not to look. Looking pays for strides and for the lengths of rows in memory:
they prove that 16 bytes may be loaded at once. It does not pay for what a kernel only counts with,
which changes from batch to batch: the last batch of an epoch would wait for compilers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from kdkernels.triton.common.prepared import Kernel

# Names of such integers: rows of a batch, groups, places, parts.
COUNTS = frozenset(
    ("B", "G", "first", "last", "rows", "splits", "parts", "tiles", "total", "m_blocks", "n_blocks")
)


def kernel(
    function: Callable[..., Any] | None = None,
    *,
    counts: tuple[str, ...] = (),
    lengths: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """`triton.jit` for a kernel that is launched: it is compiled once for all values of COUNTS and
    of the arguments in `counts`, except of those in `lengths`, along which it reads memory."""
    if function is None:
        return lambda function: kernel(function, counts=counts, lengths=lengths)
    ignored = sorted(COUNTS.union(counts).difference(lengths))
    if triton.knobs.runtime.interpret:
        return triton.jit(function, do_not_specialize=ignored)
    return Kernel(function, ignored)
