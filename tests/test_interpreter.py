# SPDX-License-Identifier: Apache-2.0
"""The patches of Triton's interpreter, under which all tests run, change no bit."""

from __future__ import annotations

from collections.abc import Sequence

import interpreter
import torch
from cases import FEW_ELEMENTS, Case, each_case, elements, gradients, leaves
from torch import Tensor

from kdkernels.testing.opinfo import Sample

CPU = torch.device("cpu")


def _largest(samples: Sequence[Sample]) -> list[Sample]:
    """Of those that every test runs: several tiles, and a last one that is not full."""
    return [max((s for s in samples if elements(s) <= FEW_ELEMENTS), key=elements)]


def _results(case: Case) -> list[Tensor]:
    args = leaves(case)
    loss = case.call(*args)
    return [loss.detach(), *gradients(loss, args)]


@each_case(
    _largest,
    dtypes=(torch.float32, torch.bfloat16),
    backends=("triton",),
    devices=(CPU,),
)
def test_patched_and_unpatched_interpreters_give_the_same_bits(case: Case) -> None:
    # first, since Triton's own interpreter refuses nothing in a function that has run before
    with interpreter.unpatched() as patches:
        assert patches > 0
        plain = _results(case)
    patched = _results(case)
    for one, other in zip(patched, plain, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
