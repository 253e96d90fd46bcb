# SPDX-License-Identifier: Apache-2.0
"""Tiles can be replaced in every op that kdkernels.testing.tiles names, and launchers use what they
are given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kdkernels.testing.opinfo import opinfos
from kdkernels.testing.tiles import CHOOSERS


@pytest.mark.parametrize("op", CHOOSERS)
def test_a_replaced_tile_is_used(op: str) -> None:
    info = next(info for info in opinfos() if info.op == op)
    chooser = CHOOSERS[op]
    sample = min(
        (s for s in info.samples(torch.device("cpu"), torch.float32) if s.args[0].numel()),
        key=lambda s: s.args[0].numel(),
    )

    def run() -> torch.Tensor:
        with torch.no_grad():
            return info.function(*sample.args, **sample.kwargs, backend="triton")

    with chooser.seen() as default:
        wanted = run()
    assert tuple(default) == chooser.names
    for name, tile in default.items():
        other = replace(tile, num_warps=2 * tile.num_warps)  # the interpreter's result is the same
        with chooser.replaced(name, other), chooser.seen() as chosen:
            assert torch.equal(run(), wanted)
        assert chosen == {**default, name: other}
    with chooser.seen() as again:
        run()
    assert again == default


@pytest.mark.parametrize("op", CHOOSERS)
def test_candidates_differ_little_at_first_and_fit(op: str) -> None:
    from kdkernels.triton.common.launch import Tile

    chooser = CHOOSERS[op]
    tiles = {name: Tile(64, 64, 32, 8, 2) for name in chooser.names}
    for name, tile in tiles.items():
        candidates = chooser.candidates(name, tiles, 12)
        assert len(candidates) == 12
        assert tile not in candidates
        assert all(chooser.fits({**tiles, name: candidate}) for candidate in candidates)
        if name in chooser.square:
            assert all(candidate.m == candidate.n for candidate in candidates)
