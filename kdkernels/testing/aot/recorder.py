# SPDX-License-Identifier: Apache-2.0
"""What launchers would compile, found by recording their launches on meta tensors.

So the ahead-of-time tests compile the specialisations and configurations of real calls, not a copy
of them. A module beside this one, named after an op, lists the calls of the op:

    call(dtype, *arguments)     one call on meta tensors, forward and backward
    EVERYWHERE, EXTRA           its arguments; those in EXTRA are compiled for one target only, to
                                keep the tests short. So where an op has two calls, EVERYWHERE pairs
                                them with two precisions: each kernel still meets each target.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import native_specialize_impl

from kdkernels.testing.fp32 import fp32_products
from kdkernels.triton.common.launch import Arch, assume_arch
from kdkernels.triton.common.prepared import every_launch_through_triton

# What kernels are compiled for, with the processors and the cache of a typical product, and what
# a program may have there.
TARGETS = {
    "sm_80": Arch("sm_80", 108, 40 << 20, 163 << 10),
    "sm_86": Arch("sm_86", 82, 6 << 20, 99 << 10),
    "sm_89": Arch("sm_89", 128, 72 << 20, 99 << 10),
    "sm_90": Arch("sm_90", 132, 50 << 20, 227 << 10),
    "sm_100": Arch("sm_100", 148, 126 << 20, 227 << 10),
    "sm_120": Arch("sm_120", 170, 96 << 20, 99 << 10),
    "gfx942": Arch("gfx942", 304, 256 << 20, 64 << 10),
}

# What a call is made with: the dtype of its features, and torch's setting for fp32 products.
_PRECISIONS = {
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
_EXTRA_TARGET = "sm_90"
_OPTIONS = ("num_warps", "num_stages")

Calls = Mapping[str, Mapping[str, tuple[Any, ...]]]  # precision -> label -> arguments of a call


@triton.jit
def _compilable():
    pass


@dataclass(frozen=True)
class AotVariant:
    """One specialisation of a kernel, whatever its name."""

    name: str = field(compare=False)
    kernel: Any
    signature: tuple[tuple[str, str], ...]  # argument -> "*bf16", "i32", "fp32", "constexpr"
    constexprs: tuple[tuple[str, Any], ...]
    divisible: frozenset[str]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages
    tensor_core: bool  # whether its products belong on tensor cores


def variants_of(arch: Arch, op: ModuleType, every: bool = False) -> Iterator[AotVariant]:
    """Each specialisation that the calls of an op compile, once; `every` call for all targets."""
    groups: tuple[Calls, ...] = (op.EVERYWHERE, op.EXTRA)
    calls = [
        (precision, label, arguments)
        for group in (groups if every or arch.name == _EXTRA_TARGET else groups[:1])
        for precision, labelled in group.items()
        for label, arguments in labelled.items()
    ]
    names: dict[AotVariant, str] = {}
    named: dict[str, AotVariant] = {}
    for precision, label, arguments in calls:
        together = launched(arch, precision, op.call, arguments)
        for variant in together:
            if variant in names:
                continue
            parts = (variant.name, label, *_facets(variant, together))
            name = "-".join((*parts, precision))
            if name in named:
                name = "-".join((*parts, _apart(variant, named[name]), precision))
            if name in named:
                raise ValueError(f"two variants would be called {name}")
            names[variant], named[name] = name, variant
            yield replace(variant, name=name)


def launched(
    arch: Arch, precision: str, call: Callable[..., Any], arguments: tuple[Any, ...]
) -> list[AotVariant]:
    """What one call launches, configured for `arch` and not run, under the names of the kernels."""
    dtype, products = _PRECISIONS[precision]
    with fp32_products(products), recorded(arch, dtype) as variants:
        call(dtype, *arguments)
    return variants


@contextlib.contextmanager
def recorded(arch: Arch, dtype: torch.dtype) -> Iterator[list[AotVariant]]:
    """The launches meanwhile, configured for `arch` and not run, of calls on features of a
    dtype."""
    variants: list[AotVariant] = []

    def record(kernel: Any, *, grid: Any, warmup: bool, **given: Any) -> None:
        variants.append(_specialise(kernel, given, dtype, arch))

    with (
        assume_arch(arch),
        every_launch_through_triton(),
        mock.patch.object(type(_compilable), "run", record),
    ):
        yield variants


def _specialise(
    kernel: Any, arguments: dict[str, Any], dtype: torch.dtype, arch: Arch
) -> AotVariant:
    """A launch as the JIT specialises it: except where it is told not to look at an argument, 1 is
    a constant and multiples of 16 are noted."""
    signature, constexprs, divisible = {}, {}, set()
    for param in kernel.params:
        value = arguments[param.name]
        kind, noted = "constexpr", None
        if not param.is_constexpr:
            looks = not param.do_not_specialize
            kind, noted = native_specialize_impl(BaseBackend, value, param.is_const, looks, True)
        signature[param.name] = kind
        if kind == "constexpr":
            constexprs[param.name] = value
        elif noted == "D":
            divisible.add(param.name)
    precision = arguments.get("PRECISION")  # of its products; a kernel without has none
    fp32_product = dtype == torch.float32 and precision == "ieee" and arch.vendor == "cuda"
    return AotVariant(
        name=kernel.__name__.strip("_"),
        kernel=kernel,
        signature=tuple(signature.items()),
        constexprs=tuple(constexprs.items()),
        divisible=frozenset(divisible),
        options=tuple((key, arguments[key]) for key in _OPTIONS if key in arguments),
        tensor_core=precision is not None and not fp32_product,
    )


def _facets(variant: AotVariant, launched: list[AotVariant]) -> list[str]:
    """What tells it from other launches of its kernel in one call: flags, integers that are 1,
    multiples of 16."""

    def facets(one: AotVariant) -> set[str]:
        constants = {
            param.lower() if param.isupper() else f"{param}_1"
            for param, value in one.constexprs
            if value
        }
        return constants | one.divisible

    others = [facets(other) for other in launched if other.kernel is variant.kernel]
    return sorted(facets(variant) - set.intersection(*others))


def _apart(variant: AotVariant, other: AotVariant) -> str:
    """The first thing that tells a variant from another of its kernel, whose name it has."""
    constants, theirs = dict(variant.constexprs), dict(other.constexprs)
    for param, value in constants.items():
        if theirs.get(param) != value:
            return f"{param.lower()}_{value}"
    for (param, kind), (_, its) in zip(variant.signature, other.signature, strict=True):
        if kind != its:
            return f"{param}_{kind.strip('*')}"
    for (option, value), (_, its) in zip(variant.options, other.options, strict=True):
        if value != its:
            return f"{option}_{value}"
    return min(variant.divisible ^ other.divisible)


def labelled_rows(n: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, D] rows and [n] labels on the meta device."""
    return (
        torch.empty((n, D), dtype=dtype, device="meta"),
        torch.empty(n, dtype=torch.int64, device="meta"),
    )
