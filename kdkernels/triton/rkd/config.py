# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of rkd_angle: data, chosen by one pure function. Those of rkd_distance are
in `common/pairs_config.py`."""

from __future__ import annotations

from dataclasses import dataclass

from kdkernels.triton.common.launch import Arch, cdiv, fill_device

# Numbers that the parts of a split sum may take together.
BUFFER = 1 << 24


@dataclass(frozen=True)
class AngleConfig:
    """Tiles m x n of pairs; what is summed over is split where there are few of them."""

    m: int
    n: int
    num_warps: int
    times: int  # that the programs fill the device
    arch: Arch

    def split_length(self, B: int, summed: int) -> int:
        """Length of a split of the sum over so many, for tiles of all pairs of B rows."""
        tiles = cdiv(B, self.m) * cdiv(B, self.n)
        most = min(max(BUFFER // max(B * B, 1), 1), cdiv(summed, 16))
        return cdiv(summed, fill_device(self.arch, tiles, most, times=self.times))


def pick_config(arch: Arch) -> AngleConfig:
    if arch.vendor == "interpreter":
        return AngleConfig(16, 16, 4, 2, arch)
    return AngleConfig(32, 32, 8, 8, arch)
