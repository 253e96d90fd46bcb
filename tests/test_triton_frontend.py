# SPDX-License-Identifier: Apache-2.0
"""Kernels as the JIT specialises them, which the interpreter never sees: those of every sample pass
Triton's front end, and batches of many sizes are compiled few times."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from kdkernels.testing import triton_frontend
from kdkernels.testing.triton_frontend import Seen

pytestmark = pytest.mark.xdist_group("triton front end")  # which would record them once each


@pytest.fixture(scope="module")
def seen() -> Seen:
    return triton_frontend.see()


def test_every_sample_passes_the_front_end(seen: Seen) -> None:
    assert seen.samples > 0
    assert seen.variants > 0
    assert not seen.failures, "\n".join(seen.failures)


def test_batches_of_many_sizes_are_compiled_few_times(seen: Seen) -> None:
    """A batch may be the length of a row in memory: of one number, of a multiple of 16, or of
    others. Nothing else about it may matter to a kernel."""
    assert seen.compilations
    often = {
        f"{kernel} of {op}": most
        for op, kernels in seen.compilations.items()
        for kernel, most in kernels.items()
        if most > 3
    }
    assert not often
