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

from kdkernels._gpu import refuse_fp64

# Decided when triton's decorators run, hence once per process.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class Arch:
    """What launch configurations depend on."""

    name: str  # "sm_90", "gfx942", "interpreter"
    processors: int  # streaming multiprocessors or compute units
    l2_bytes: int

    @property
    def vendor(self) -> str:
        return {"sm_": "cuda", "gfx": "hip"}.get(self.name[:3], self.name)


# With two "processors" and a tiny cache, so that small samples are split and chunked.
INTERPRETER = Arch("interpreter", 2, 1 << 14)


@cache
def _device_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return Arch(name, properties.multi_processor_count, properties.L2_cache_size)


_assumed: Arch | None = None


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
    """Launches go to the current device; make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# A program that sweeps over rows without a product takes so many rows, of which it reads so many
# columns at a time.
ROWS, COLUMNS = 4, 128


@dataclass(frozen=True)
class Tile:
    """Output tile m x n of a product, its contraction step, and how the program is compiled."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """As arguments of a kernel."""
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


def compiled_as(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
