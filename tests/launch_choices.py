# SPDX-License-Identifier: Apache-2.0
"""Checks, in a process without TRITON_INTERPRET, that a launch which `prepared.Launch` remembers is
of the kernel that Triton would choose for its arguments. Nothing is compiled.

Prints how many launches were made of remembered kernels, and of those the ones that Triton would
have made of others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from kdkernels.testing.launches import _for_a_gpu, run
from kdkernels.testing.no_launches import Driver
from kdkernels.testing.steps import Step, steps

Facts = tuple[tuple[Any, ...], str]
remembered = 0
wrong: list[str] = []


@triton.jit
def _some_kernel():
    pass


def choice(kernel: Any, *args: Any, **given: Any) -> Facts:
    """What Triton looks a compiled kernel up by."""
    binder = kernel.device_caches[0][-1]
    _, specialization, options = binder(*args, **given)
    return tuple(specialization), str(options)


class Chosen(CompiledKernel):
    """Stands in for a compiled kernel."""

    metadata = SimpleNamespace(target=SimpleNamespace(backend="cuda"))

    def __init__(self, kernel: Any, facts: Facts, options: dict[str, Any]) -> None:
        self.jit, self.facts, self.options = kernel, facts, options

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any) -> None:
            global remembered
            remembered += 1
            if choice(self.jit, *args, **self.options) != self.facts:
                wrong.append(f"{self.jit.__name__}: {self.facts}")

        return launch


def launched(kernel: Any, *, grid: Any, warmup: bool, **given: Any) -> Chosen:
    options = {name: value for name, value in given.items() if name not in kernel.arg_names}
    return Chosen(kernel, choice(kernel, **given), options)


def shifted(x: Any) -> Any:
    """The same numbers at an address that is no multiple of 16."""
    if not isinstance(x, Tensor):
        return x
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x.detach())
    return moved.requires_grad_(x.requires_grad)


def versions(step: Step) -> Iterator[Step]:
    """Tensors that meet the same `Launch`, and change what Triton chooses."""
    yield step
    yield Step(step.name, step.op, tuple(map(shifted, step.args)), step.options, step.eager)
    yield Step(step.name, step.op, (step.args[0], *map(shifted, step.args[1:])), step.options,
               step.eager)  # fmt: skip


def main() -> None:
    driver.set_active(Driver())
    with _for_a_gpu(), mock.patch.object(type(_some_kernel), "run", launched):
        for step in steps():
            for version in versions(step):
                for _ in range(2):
                    run(version, version.call)
    print(json.dumps({"remembered": remembered, "wrong": wrong}))


if __name__ == "__main__":
    main()
