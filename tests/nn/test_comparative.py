# SPDX-License-Identifier: Apache-2.0
"""ComparativeLoss: the formula over all pairs."""

from __future__ import annotations

import pytest
import torch
from modules import maps

import kdkernels as kd

COMPARATIVE = kd.nn.ComparativeLoss


def test_comparisons_of_all_pairs() -> None:
    student, teacher = maps(7, 3, 2).requires_grad_(), maps(7, 3, 2)
    d = (student - teacher).flatten(1)
    expected = 3 * (d[:, None] - d).square().mean()
    loss = COMPARATIVE(3)(student, teacher)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted)
    shifted = COMPARATIVE()(teacher + 1000, teacher)
    torch.testing.assert_close(shifted, torch.zeros_like(shifted))
    assert COMPARATIVE()(maps(0, 4), maps(0, 4)).item() == 0


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="teacher must have 5 outputs per sample like student"):
        COMPARATIVE()(maps(6, 5), maps(6, 4))
