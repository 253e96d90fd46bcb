# SPDX-License-Identifier: Apache-2.0
"""Calls of gram_mse that together launch every kernel, for the ahead-of-time tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kdkernels.triton._ahead import AotVariant, record_launches, specialise
from kdkernels.triton._common import Arch

# (label, B, D, options of the operator, gradients needed). The first three launch every kernel.
_CALLS: tuple[tuple[str, int, int, tuple[Any, ...], tuple[bool, bool]], ...] = (
    ("feature", 256, 25088, ("feature", "linear", 0.4, 2, "resident"), (True, False)),
    ("row_l1", 4096, 512, ("row_l1", "linear", 0.4, 2, "streamed"), (True, True)),
    ("row_l2", 8192, 512, ("row_l2", "linear", 0.4, 2, "factored"), (True, False)),
    ("row_l2", 256, 25088, ("row_l2", "linear", 0.4, 2, "resident"), (True, False)),
    ("rbf_taylor", 4096, 512, ("feature", "rbf_taylor", 0.4, 2, "streamed"), (True, False)),
    ("feature", 8192, 512, ("feature", "linear", 0.4, 2, "factored"), (True, False)),
)
_CORE = _CALLS[:3]
_EVERYWHERE = (
    ("bf16", torch.bfloat16, "highest", _CORE),
    ("fp32", torch.float32, "highest", _CORE),
)
# The other forms and precisions on one target, to keep the tests short.
_EXTRA_TARGET = "sm_90"
_EXTRA = (
    ("bf16", torch.bfloat16, "highest", _CALLS[3:]),
    ("fp16", torch.float16, "highest", _CORE),
    ("tf32", torch.float32, "high", _CORE),
)


def variants(
    arch: Arch, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Iterator[AotVariant]:
    """Each specialisation that the calls above compile, once."""
    seen = set()
    for dtype_name, dtype, fp32_matmul, calls in _EVERYWHERE + (
        _EXTRA if arch.name == _EXTRA_TARGET else ()
    ):
        for label, B, D, options, need in calls:
            with _fp32_matmul_precision(fp32_matmul):
                launches = record_launches(
                    arch, partial(_call, forward, backward, dtype, B, D, options, need)
                )
            for kernel, arguments in launches:
                precision = arguments.get("PRECISION")
                tensor_core = precision is not None and not (
                    dtype == torch.float32 and precision == "ieee" and arch.vendor == "cuda"
                )
                words = (
                    kernel.__name__.strip("_"),
                    options[4],
                    label,
                    *_facets(arguments),
                    dtype_name,
                )
                variant = specialise("-".join(words), kernel, arguments, tensor_core=tensor_core)
                key = (kernel.__name__, variant.signature, variant.constexprs, variant.divisible)
                if key not in seen:
                    seen.add(key)
                    yield variant


def _facets(arguments: dict[str, Any]) -> list[str]:
    """What tells apart the launches of one kernel in one call."""
    words = {"SS": "ss", "TT": "tt", "TS": "ts", "WEIGHTED": "weighted", "ADD": "add"}
    return [word for flag, word in words.items() if arguments.get(flag)]


def _call(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    dtype: torch.dtype,
    B: int,
    D: int,
    options: tuple[Any, ...],
    need: tuple[bool, bool],
) -> None:
    """One forward and backward on meta tensors, student and teacher of one width."""
    student, teacher = (torch.empty((1, B, D), dtype=dtype, device="meta") for _ in range(2))
    _, *residuals = forward(student, teacher, *options)
    backward(torch.empty((1,), device="meta"), student, teacher, *residuals, *need, *options)


@contextlib.contextmanager
def _fp32_matmul_precision(precision: str) -> Iterator[None]:
    outer = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(outer)
