# SPDX-License-Identifier: Apache-2.0
"""What a launcher would compile, found by recording its launches on meta tensors.

So the ahead-of-time tests compile the specialisations and configurations of real calls, not a copy
of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from kdkernels.triton._common import Arch, assume_arch

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
_OPTIONS = ("num_warps", "num_stages")


@triton.jit
def _compilable():
    pass


@dataclass(frozen=True)
class AotVariant:
    """One specialisation of a kernel."""

    name: str
    kernel: Any
    signature: tuple[tuple[str, str], ...]  # argument -> "*bf16", "i32", "fp32", "constexpr"
    constexprs: tuple[tuple[str, Any], ...]
    divisible: frozenset[str]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages
    tensor_core: bool  # whether its products belong on tensor cores


def record_launches(arch: Arch, call: Callable[[], Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Kernel and keyword arguments of each launch of `call`, configured for `arch`, not run."""
    launches: list[tuple[Any, dict[str, Any]]] = []

    def record(kernel: Any, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        launches.append((kernel, arguments))

    with assume_arch(arch), mock.patch.object(type(_compilable), "run", record):
        call()
    return launches


def specialise(
    name: str, kernel: Any, arguments: dict[str, Any], *, tensor_core: bool
) -> AotVariant:
    """A launch as the JIT specialises it: 1 is a constant, multiples of 16 are noted."""
    signature, constexprs, divisible = {}, {}, set()
    for param, declared in inspect.signature(kernel.fn).parameters.items():
        value = arguments[param]
        if "constexpr" in str(declared.annotation) or (isinstance(value, int) and value == 1):
            signature[param] = "constexpr"
            constexprs[param] = value
        elif isinstance(value, Tensor):
            signature[param] = _POINTERS[value.dtype]
            divisible.add(param)
        elif isinstance(value, int):
            signature[param] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible.add(param)
        else:
            signature[param] = "fp32"
    options = tuple((key, arguments[key]) for key in _OPTIONS if key in arguments)
    return AotVariant(
        name,
        kernel,
        tuple(signature.items()),
        tuple(constexprs.items()),
        frozenset(divisible),
        options,
        tensor_core,
    )
