# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of rkd_angle: data, chosen by one pure function. Those of rkd_distance are
in `common/pairs_config.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kdkernels.triton.common.launch import Arch, cdiv, fill_device, split_length

# Numbers that the parts of a split sum may take together.
BUFFER = 1 << 24
BLOCK = 1024  # numbers that a program takes at a time where it takes no tile


@dataclass(frozen=True)
class AngleConfig:
    """Tiles m x n of pairs; what is summed over is split where there are few of them."""

    m: int
    n: int
    num_warps: int
    times: int  # that the programs fill the device
    arch: Arch

    def tiles(self, B: int) -> int:
        """Of all pairs of B rows."""
        return cdiv(B, self.m) * cdiv(B, self.n)

    def split(self, B: int, summed: int, sides: int = 1) -> tuple[int, int]:
        """(length of a split, number of splits) of a sum over so many, for tiles of all pairs."""
        most = min(max(BUFFER // (sides * B * B), 1), cdiv(summed, 16))
        splits = fill_device(self.arch, sides * self.tiles(B), most, times=self.times)
        length = split_length(summed, splits, 16)
        return length, max(1, cdiv(summed, length))


@cache
def pick_config(arch: Arch) -> AngleConfig:
    if arch.vendor == "interpreter":
        return AngleConfig(16, 16, 4, 2, arch)
    return AngleConfig(32, 32, 8, 8, arch)
