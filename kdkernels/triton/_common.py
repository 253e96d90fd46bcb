# SPDX-License-Identifier: Apache-2.0
"""What all Triton kernels share: the architecture, and the product of tiles in each precision."""

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


# What the tests compile for ahead of time, with processors and cache of a typical product.
TARGETS = {
    "sm_80": Arch("sm_80", 108, 40 << 20),
    "sm_90": Arch("sm_90", 132, 50 << 20),
    "sm_100": Arch("sm_100", 148, 126 << 20),
    "gfx942": Arch("gfx942", 304, 256 << 20),
}
INTERPRETER = Arch(
    "interpreter", 2, 1 << 14
)  # two "processors" and a tiny cache: splits and chunks at small sizes


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


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device; make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


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


@dataclass(frozen=True)
class Precision:
    """`input_precision` of the products whose operands are not both in bf16, or both in fp16."""

    features: str  # fp32 features among themselves, as torch's setting for fp32 matmuls says
    weights: str  # tiles of weights times features
    factors: str  # where single tf32 or bf16 operands would lose the result


def pick_precision(dtype: torch.dtype, arch: Arch, fp32_matmul: str) -> Precision:
    """Precision of products with features of a dtype, given `torch.get_float32_matmul_precision()`.

    fp16 features fit tf32 exactly, but factors and weights do not fit the range of fp16: tf32.
    """
    nvidia = arch.vendor == "cuda"
    if dtype == torch.float32 and fp32_matmul == "highest":
        return Precision("ieee", "ieee", "ieee")
    tf32 = "tf32" if nvidia or arch.name == "gfx942" else "ieee"
    return Precision(tf32, tf32, "tf32x3" if nvidia else "ieee")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b for operands of one dtype."""
    if INTERPRETED:  # whose product of bf16 operands is wrong (triton 3.7)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_split(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b where one operand is fp32 and must keep more digits than the other's dtype has.

    Against bf16 the fp32 operand is split into two bf16 pieces: one piece would leave 8 bits.
    """
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        acc = dot((a - high.to(tl.float32)).to(tl.bfloat16), b, acc, PRECISION)
        return dot(high, b, acc, PRECISION)
    elif a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        acc = dot(a, (b - high.to(tl.float32)).to(tl.bfloat16), acc, PRECISION)
        return dot(a, high, acc, PRECISION)
    else:
        return dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)


@triton.jit
def dot_weights(w, x, acc, PRECISION: tl.constexpr):
    """acc + w @ x for weights w whose rounding to bf16 is no worse than that of bf16 features x.

    fp16 weights would leave the range of fp16, so there both are fp32.
    """
    if x.dtype == tl.bfloat16:
        return dot(w.to(tl.bfloat16), x, acc, PRECISION)
    else:
        return dot(w.to(tl.float32), x.to(tl.float32), acc, PRECISION)


@triton.jit
def split_tile(M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, columns, split) of a program that makes a tile of one split of a product."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    offs_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    return offs_m, offs_n, tl.program_id(1)


@triton.jit
def store_split(out_ptr, acc, split, offs_m, offs_n, M, N):
    """The tile of `split_tile` to its place in [splits, M, N], contiguous."""
    tl.store(
        out_ptr + (split.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(offs_m < M)[:, None] & (offs_n < N)[None, :],
    )


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
