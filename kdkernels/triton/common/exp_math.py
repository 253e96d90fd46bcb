# SPDX-License-Identifier: Apache-2.0
"""Logarithms that keep their digits where the hardware's do not."""

from __future__ import annotations

import triton

# Triton's interpreter refuses functions of a module that does not see triton.language (triton 3.7).
import triton.language as tl  # noqa: F401


@triton.jit
def two_atanh(s):
    """log((1 + s) / (1 - s)) for |s| <= 1 / 3: the Taylor polynomial of csrc/common/exp_math.h with
    7 terms."""
    s2 = s * s
    p = s2 * (1.0 / 13.0) + (1.0 / 11.0)
    p = s2 * p + (1.0 / 9.0)
    p = s2 * p + (1.0 / 7.0)
    p = s2 * p + (1.0 / 5.0)
    p = s2 * p + (1.0 / 3.0)
    return 2.0 * s * (s2 * p + 1.0)
