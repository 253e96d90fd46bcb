# SPDX-License-Identifier: Apache-2.0
"""Launches whose arguments are decided once, and made many times with other tensors.

`kernel[grid](...)` looks at every argument of every call again, which takes more of the host's time
than a small kernel takes of the GPU's. Sizes, strides and options of an op repeat from step to
step. So an op keeps what it decided from them, found again by these facts
(`functools.lru_cache(REMEMBERED)`), and with it a `Launch` per kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

# Plans and launches of each kind that are remembered: more than there are sizes of batches in use.
REMEMBERED = 512

_remember = True


@contextlib.contextmanager
def every_launch_through_triton() -> Iterator[None]:
    """Launches go through `kernel[grid](...)` each time, where something watches that path."""
    global _remember
    outer, _remember = _remember, False
    try:
        yield
    finally:
        _remember = outer


class Launch:
    """A kernel, its grid, and all its arguments but those that the call gives by name: tensors, and
    floats that may change from step to step.

    Triton compiles a kernel for the types of its arguments, the integers among them that are 1 or
    multiples of 16, and the pointers that are; the value of a float does not matter. Integers are
    fixed here, so the compiled kernel that Triton chose is that of all later calls on tensors of
    the same dtypes and alignments, on the same device. It is launched as Triton's documentation
    launches a compiled kernel, with all arguments in their order. On AMD GPUs, where the size of a
    tensor counts too, Triton chooses at each call.

    A hook added to the kernel after its first launch is not called; the launch hooks of
    `triton.knobs` are.
    """

    __slots__ = ("_arguments", "_by_name", "_compiled", "_places", "grid", "kernel")

    def __init__(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        names = kernel.arg_names
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self._by_name = arguments
        self._arguments = [arguments.get(name) for name in names]
        self._places = [(i, name) for i, name in enumerate(names) if name not in arguments]
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, **changing: Tensor | float) -> None:
        arguments = self._arguments.copy()
        facts: list[Any] = []
        for place, name in self._places:
            x = arguments[place] = changing[name]
            if x.__class__ is float:
                facts.append(float)
            else:
                facts += x.dtype, x.data_ptr() % 16 == 0
                device = x.device
        key = (device, *facts)
        compiled = self._compiled.get(key) if _remember else None
        if compiled is not None:
            compiled(*arguments)
            return
        compiled = self.kernel[self.grid](**changing, **self._by_name)
        if (
            _remember
            and isinstance(compiled, CompiledKernel)
            and compiled.metadata.target.backend == "cuda"
        ):
            self._compiled[key] = compiled[self.grid]
