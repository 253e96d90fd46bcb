# SPDX-License-Identifier: Apache-2.0
"""What launches depend on: the architecture, the device, the tile of a program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels._gpu import refuse_capability, refuse_fp64

# Decided when triton's decorators run, hence once per process.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class Arch:
    """What launch configurations depend on."""

    name: str  # "sm_90", "gfx942", "interpreter"
    processors: int  # streaming multiprocessors or compute units
    l2_bytes: int
    shared_bytes: int  # of shared memory that a program may take

    @property
    def vendor(self) -> str:
        return {"sm_": "cuda", "gfx": "hip"}.get(self.name[:3], self.name)

    @property
    def narrow(self) -> bool:
        """Whether this is an NVIDIA GPU for graphics (compute capability 8.6, 8.9 or 12): with 99
        KiB a program and 1536 threads a processor, for which the compiler keeps registers low."""
        return self.vendor == "cuda" and self.shared_bytes < 128 << 10


# KiB of shared memory that a program of any kernel takes at most, per generation of GPUs that
# Triton compiles alike for; `tests/test_triton_targets.py` holds kernels to it.
SHARED_KIB = {"sm_80": 99, "sm_90": 160, "sm_100": 160, "sm_120": 99, "gfx": 64}
_GENERATIONS = {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}  # by major capability


def shared_kib(arch: Arch) -> int:
    """What kernels are held to on an architecture."""
    if arch.vendor == "hip":
        return SHARED_KIB["gfx"]
    major = int(arch.name.removeprefix("sm_")) // 10
    return SHARED_KIB[_GENERATIONS.get(major, "sm_120")]


@cache
def refuse_arch(arch: Arch) -> str | None:
    """Why kernels do not run on an architecture, though a forward might; None if all do."""
    if arch.vendor == "interpreter":
        return None
    if arch.vendor == "cuda":
        reason = refuse_capability(*divmod(int(arch.name.removeprefix("sm_")), 10))
        if reason is not None:
            return reason
    kib, has = shared_kib(arch), arch.shared_bytes // 1024
    if kib <= has:
        return None
    return (
        f"its kernels take up to {kib} KiB of shared memory, and {arch.name} gives a program {has}"
    )


# With two "processors" and a tiny cache, so that small samples are split and chunked.
INTERPRETER = Arch("interpreter", 2, 1 << 14, 1 << 30)


@cache
def _device_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name, shared = properties.gcnArchName.partition(":")[0], properties.shared_memory_per_block
    else:
        name = f"sm_{properties.major}{properties.minor}"
        shared = properties.shared_memory_per_block_optin
    return Arch(name, properties.multi_processor_count, properties.L2_cache_size, shared)


_assumed: Arch | None = None
_AS_IT_IS = contextlib.nullcontext()


@contextlib.contextmanager
def assume_arch(arch: Arch) -> Iterator[None]:
    """Configure launches for a device that need not be here, to compile for it."""
    global _assumed
    outer, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = outer


def arch_of(tensor: Tensor) -> Arch:
    """The architecture that runs kernels on this tensor."""
    if _assumed is not None:
        return _assumed
    if INTERPRETED.value:
        return INTERPRETER
    return _device_arch(tensor.device.index)


def supports(*args: Any) -> str | None:
    """Why an operator's arguments cannot be handled; None if they can."""
    return refuse_fp64(args[0])


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device; make it that of the tensor, where it is not."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(tensor.device)


def given(x: Tensor | None, other: Tensor) -> Tensor:
    """x, or in place of an argument that a kernel does not use some tensor."""
    return other if x is None else x


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# A program that sweeps over rows without a product takes so many rows, of which it reads so many
# columns at a time.
ROWS, COLUMNS = 4, 128


# Partial results of a split loop are written and added up, so there are never more than these.
MOST_SPLITS = 64


def fill_device(arch: Arch, programs: int, most: int, *, times: int = 2) -> int:
    """Into how many parts, from 1 to `most`, a loop is split that `programs` programs would go
    through alone: as many as give each processor `times` programs."""
    return max(1, min(cdiv(times * arch.processors, max(programs, 1)), most))


def split_length(length: int, splits: int, step: int) -> int:
    """Length of one of so many splits of a loop, in whole steps."""
    return max(1, cdiv(cdiv(length, splits), step)) * step


def rows_in_l2(arch: Arch, row_bytes: int, tile_rows: int) -> int:
    """How many rows a kernel writes at a time for another that reads them from the L2 cache: those
    that fill half of it, in whole tiles, and at least one tile of them."""
    fitting = arch.l2_bytes // 2 // max(row_bytes, 1) // tile_rows * tile_rows
    return max(tile_rows, fitting)


@dataclass(frozen=True)
class Tile:
    """Output tile m x n of a product, its contraction step, and how the program is compiled."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """The arguments of a kernel that takes this tile."""
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip

    def launch_square(self) -> dict[str, int]:
        """The arguments of a kernel that takes square tiles only, of m x m."""
        return {
            "BLOCK": self.m, "BLOCK_K": self.k,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip

    def count(self, m: int, n: int) -> int:
        """How many tiles cover an m x n output."""
        return cdiv(m, self.m) * cdiv(n, self.n)

    def split(self, k: int, programs: int, arch: Arch, unit: int | None = None) -> tuple[int, int]:
        """(length of a split, number of splits) of a contraction over k, which `programs` programs
        would do alone. The splits fill the device, while each still takes several steps. Their
        length is a multiple of `unit`, by default of a step.
        """
        splits = fill_device(arch, programs, min(k // (4 * self.k), MOST_SPLITS))
        length = split_length(k, splits, unit or self.k)
        return length, max(1, cdiv(k, length))
