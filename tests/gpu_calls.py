# SPDX-License-Identifier: Apache-2.0
"""Calls on Triton as a GPU would see them, in a process without TRITON_INTERPRET. Nothing is
compiled or run. Prints

    remembered  how many launches `prepared.Launch` made of kernels that it had kept
    wrong       of those the ones that Triton would have made of other kernels
    calls       how many calls, forward and backward, were made on tensors that hold no numbers
    reads       of those the ones that read a number, for which a GPU would be waited for, or that
                took a tensor from the host: a CUDA graph can capture neither
"""

from __future__ import annotations

import importlib
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

from kdkernels import _dispatch
from kdkernels.testing.aot.recorder import TARGETS, recorded
from kdkernels.testing.launches import Operations, run
from kdkernels.testing.no_launches import Driver, cpu_tensors_for
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos
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


class Watched(Operations):
    """Refuses operations on tensors of the host."""

    def run(self, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        devices = {x.device.type for x in args if isinstance(x, Tensor) and x.dim() > 0}
        if "cpu" in devices:
            raise RuntimeError(f"{name} takes a tensor from the host")
        return function(*args, **kwargs)


def on_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


def spelled(options: dict[str, Any]) -> str:
    return str({key: "tensor" if isinstance(x, Tensor) else x for key, x in options.items()})


def differentiate(info: OpInfo, sample: Sample) -> None:
    args = tuple(map(on_meta, sample.args))
    places = info.places(args).values()
    args = tuple(
        x.detach().requires_grad_() if i in places and isinstance(x, Tensor) else x
        for i, x in enumerate(args)
    )
    options = {key: on_meta(x) for key, x in sample.kwargs.items()}
    with Watched():
        out = info.function(*args, **options, backend="triton")
        wanted = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        if out.requires_grad:
            torch.autograd.grad(out.sum(), wanted, allow_unused=True)


def read() -> tuple[int, list[str]]:
    """One call of each op with each set of options; how many, and those that read something."""
    calls, found, seen = 0, [], set()
    backend = importlib.import_module("kdkernels.triton")
    # torch knows no autocast of tensors without a device
    autocast = mock.patch.object(torch, "is_autocast_enabled", return_value=False)
    with mock.patch.object(backend, "rejects", return_value=None), autocast:
        for info in opinfos():
            for sample in info.samples(torch.device("cpu"), torch.bfloat16):
                options = (info.name, spelled(sample.kwargs))
                plan = _dispatch.plan(info.public, *sample.args, **sample.kwargs, backend="triton")
                refused = _dispatch.why_not(info.op, "triton", plan.operator_args)
                if refused is not None or options in seen:
                    continue
                seen.add(options)
                calls += 1
                with recorded(TARGETS["sm_90"], torch.bfloat16):
                    try:
                        differentiate(info, sample)
                    except Exception as error:  # of any kind: it is what this looks for
                        found.append(f"{info.name}, {sample.name}: {error}")
    return calls, found


def choose() -> None:
    """Launches the steps twice each, on tensors at addresses that Triton tells apart."""
    driver.set_active(Driver())
    with cpu_tensors_for(TARGETS["sm_90"]), mock.patch.object(type(_some_kernel), "run", launched):
        for step in steps():
            for version in versions(step):
                for _ in range(2):
                    run(version, version.call)


def main() -> None:
    choose()
    calls, reads = read()
    print(json.dumps({"remembered": remembered, "wrong": wrong, "calls": calls, "reads": reads}))


if __name__ == "__main__":
    main()
