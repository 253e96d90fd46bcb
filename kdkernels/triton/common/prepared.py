# SPDX-License-Identifier: Apache-2.0
"""Launches that look at their arguments once.

Triton looks at every argument of every launch to find the compiled kernel, which takes more of the
host's time than a small kernel takes of the GPU's. A `Kernel` finds it by fewer questions. A
`Launch` asks none but about tensors: sizes, strides and options of an op repeat from step to step,
so an op keeps what it decided from them, found again by these facts
(`functools.lru_cache(REMEMBERED)`), and with it a `Launch` per kernel.

Triton compiles a kernel for the types of its arguments, the integers among them that are 1 or
multiples of 16, and the pointers that are; the value of a float does not matter. So the compiled
kernel that Triton chose is that of all later launches with the same integers and constants, and
tensors of the same dtypes and alignments on the same device. It is launched as Triton's
documentation launches a compiled kernel, with all arguments in their order. On AMD GPUs, where the
size of a tensor counts too, Triton chooses at each launch. A hook that is added to a kernel after
its first launch is not called; the launch hooks of `triton.knobs` are.
"""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from triton import JITFunction
from triton.compiler import CompiledKernel

# Plans and launches of each kind that are remembered: more than there are sizes of batches in use.
REMEMBERED = 512
# Sets of arguments of a kernel by which it finds what was compiled.
MOST_FACTS = 4096

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


class Kernel(JITFunction):
    """A kernel that finds what was compiled for a launch by the launch's own arguments."""

    def __init__(self, function: Any, do_not_specialize: list[str]) -> None:
        super().__init__(function, do_not_specialize=do_not_specialize)
        self._names = [param.name for param in self.params]
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._remembers = True

    @property
    def cache_key(self) -> str:
        """Triton's, of which the key in the cache is made, whatever was launched before.

        Triton takes the constants of a called function into account if something called it earlier
        in this process. Here each function is looked at after all that it calls.
        """
        if self.hash is None:
            for function in _called_by(self):
                _settle(function)
        return super().cache_key

    def run(self, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        asked = self._remembers and _remember and not warmup and not args
        key = _facts(named) if asked else None
        compiled = None if key is None else self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*[named[name] for name in self._names])
            return compiled
        compiled = super().run(*args, grid=grid, warmup=warmup, **named)
        if key is not None and isinstance(compiled, CompiledKernel):
            self._remembers = _keeps(compiled)  # or else the next launch asks in vain
            if len(self._compiled) == MOST_FACTS:  # of so many sizes each is rare
                self._compiled.clear()
            if self._remembers:
                self._compiled[key] = compiled
        return compiled


_settled: set[int] = set()  # ids, since a function's hash is made of its cache key


def _settle(function: JITFunction) -> None:
    """Compute a function's cache key after those of the functions that it calls."""
    if id(function) in _settled:
        return
    for called in _called_by(function):
        _settle(called)
    function.hash = None
    function.cache_key  # noqa: B018, computed here and kept
    _settled.add(id(function))


def _called_by(function: JITFunction) -> list[JITFunction]:
    code = dis.get_instructions(function.fn)
    names = dict.fromkeys(i.argval for i in code if i.opname == "LOAD_GLOBAL")
    values = (function.__globals__.get(name) for name in names)
    return [value for value in values if isinstance(value, JITFunction)]


def _facts(named: dict[str, Any]) -> tuple[Any, ...] | None:
    """Of the arguments of a launch, by their names; None where they are of other types."""
    facts: list[Any] = [*named]
    device = None
    for x in named.values():
        kind = x.__class__
        if kind is int or kind is str:
            facts.append(x)
        elif kind is float:
            facts.append(float)
        elif kind is bool:
            facts.append((x,))  # Triton tells it from 0 and 1
        elif isinstance(x, Tensor):
            facts += x.dtype, x.data_ptr() % 16 == 0
            device = x.device
        else:
            return None
    facts.append(device)
    return tuple(facts)


def _keeps(compiled: Any) -> bool:
    """Whether it is a compiled kernel of a GPU on which facts decide: none was compiled under the
    interpreter, or where a test takes the launch."""
    return isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda"


class Launch:
    """A kernel, its grid, and all its arguments but those that the call gives by name: tensors, and
    floats that may change from step to step."""

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
        if _remember and _keeps(compiled):
            self._compiled[key] = compiled[self.grid]
