# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of correlation: data, chosen by one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton

from kdkernels.triton.common.launch import (
    MOST_SPLITS,
    Arch,
    cdiv,
    fill_device,
    split_length,
)
from kdkernels.triton.common.prepared import REMEMBERED

NUM_WARPS = 4
BLOCK = 1024  # correlations that are added up at a time


@dataclass(frozen=True)
class CorrelationConfig:
    """Tiles as (rows, columns); each holds a few numbers per element in registers."""

    by_row: tuple[int, int]  # of programs that go along rows
    by_column: tuple[int, int]  # of programs that go along columns
    split_m: int  # rows that one of those goes through


@lru_cache(REMEMBERED)
def pick_config(B: int, C: int, *, arch: Arch) -> CorrelationConfig:
    elements, most, columns = (256, 32, 16) if arch.vendor == "interpreter" else (1024, 512, 64)
    across = min(triton.next_power_of_2(C), most)
    rows = min(triton.next_power_of_2(B), max(1, elements // across))
    down = elements // columns
    tiles = cdiv(C, columns)
    splits = fill_device(arch, tiles, min(cdiv(B, down), MOST_SPLITS))
    return CorrelationConfig((rows, across), (down, columns), split_length(B, splits, down))
