# SPDX-License-Identifier: Apache-2.0
"""The product of tiles in each precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kdkernels.triton.common.launch import INTERPRETED, Arch


@dataclass(frozen=True)
class Precision:
    """`input_precision` of the products whose operands are not both in bf16, or both in fp16."""

    features: str  # fp32 features among themselves, as torch's setting for fp32 matmuls says
    weights: str  # tiles of weights times features
    factors: str  # where single tf32 or bf16 operands would lose the result


def pick_precision(dtype: torch.dtype, arch: Arch, fp32_matmul: str) -> Precision:
    """Precision of products with features of a dtype, given `kdkernels._gpu.fp32_matmul()`.

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
