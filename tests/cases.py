# SPDX-License-Identifier: Apache-2.0
"""The cases of the generic matrix, op x backend x device x dtype x sample, and what its tests
share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import _dispatch
from kdkernels.testing import numerics
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos

SHORT = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
DEVICES = tuple(
    torch.device(name) for name in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
)
# Most elements of a sample that runs in every test; the others run in the parity test only.
FEW_ELEMENTS = 4000


@dataclass(frozen=True)
class Case:
    """One op on one backend, device and dtype, with one sample."""

    info: OpInfo
    backend: str
    device: torch.device
    dtype: torch.dtype
    sample: Sample

    @property
    def id(self) -> str:
        device = "" if self.device.type == "cpu" else f"{self.device.type}-"
        return f"{self.info.name}-{self.backend}-{device}{SHORT[self.dtype]}-{self.sample.name}"

    @property
    def places(self) -> dict[str, int]:
        """Where the differentiable arguments are."""
        return self.info.places(self.sample.args)

    def why_not(self) -> str | None:
        """Why this machine cannot run the case."""
        return _dispatch.why_not(self.info.op, self.backend, self.operator_args())

    def operator_args(self) -> tuple[Any, ...]:
        """Arguments of the forward operator, without the backend and with forms of its tensors."""
        kwargs = {**self.sample.kwargs, "backend": self.backend}
        plan = _dispatch.plan(self.info.public, *self.sample.args, **kwargs)
        return plan.operator_args

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The public function on this backend, with the sample's options."""
        return self.info.function(
            *args, **{**self.sample.kwargs, "backend": self.backend, **kwargs}
        )

    def on(self, backend: str) -> Case:
        return replace(self, backend=backend)

    def having(self, *args: Any, name: str = "", cancels: bool | None = None) -> Case:
        """The same case on other arguments."""
        sample = self.sample
        cancels = sample.cancels if cancels is None else cancels
        return replace(
            self, sample=replace(sample, args=args, name=name or sample.name, cancels=cancels)
        )

    def errors(self, rows: Tensor | None = None) -> list[numerics.Error]:
        return numerics.check_sample(self.info, self.sample, self.dtype, self.backend, rows)


@cache
def _samples(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Sample, ...]:
    (info,) = (info for info in opinfos() if info.name == name)
    return tuple(info.samples(device, dtype))


def samples(info: OpInfo, device: torch.device, dtype: torch.dtype) -> tuple[Sample, ...]:
    return _samples(info.name, device, dtype)


def elements(sample: Sample) -> int:
    return sum(arg.numel() for arg in sample.args if isinstance(arg, Tensor))


def few(found: Sequence[Sample]) -> list[Sample]:
    """The smallest sample of each set of options, and the strided one: one of each path through the
    code."""
    smallest: dict[str, Sample] = {}
    for sample in found:
        if 0 < elements(sample) <= FEW_ELEMENTS and not sample.cancels:
            key = "strided" if sample.name == "strided" else repr(sample.kwargs)
            if key not in smallest or elements(sample) < elements(smallest[key]):
                smallest[key] = sample
    return list(smallest.values())


def interpreted(backend: str, device: torch.device) -> bool:
    """Whether kernels run in Triton's interpreter, or CUDA's on the host: slowly."""
    return backend in ("triton", "cuda") and device.type == "cpu"


def _worth_interpreting(i: int, dtype: torch.dtype, interpret_all: bool) -> bool:
    """Every third sample; or all in fp32, and another third in each of the other dtypes."""
    if not interpret_all:
        return i % 3 == 0
    return dtype == torch.float32 or i % 3 == list(SHORT).index(dtype)


def cases(
    pick: Callable[[Sequence[Sample]], Sequence[Sample]] = few,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    backends: Sequence[str] = _dispatch.BACKENDS,
    devices: Sequence[torch.device] = DEVICES,
    interpret_all: bool = False,
) -> Iterator[Case]:
    """Every case of the picked samples, including those that this machine cannot run (conftest.py
    deselects them)."""
    for info in opinfos():
        for device in devices:
            for dtype in (dtype for dtype in info.dtypes if dtype in dtypes):
                picked = pick(samples(info, device, dtype))
                for i, sample in enumerate(picked):
                    for backend in backends:
                        if not interpreted(backend, device) or _worth_interpreting(
                            i, dtype, interpret_all
                        ):
                            yield Case(info, backend, device, dtype, sample)


def each_case(*args: Any, **kwargs: Any) -> pytest.MarkDecorator:
    """Parametrise a test by `case`. Cases on a GPU carry the marker `gpu`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case, id=case.id, marks=[pytest.mark.gpu] if case.device.type == "cuda" else []
            )
            for case in cases(*args, **kwargs)
        ],
    )


def each_info() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("info", opinfos(), ids=[info.name for info in opinfos()])


def leaves(case: Case, need: Sequence[bool] | None = None) -> list[Any]:
    """The sample's arguments, those of diff_args requiring a gradient where `need` says so
    (default: all)."""
    places = list(case.places.values())
    args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in case.sample.args]
    for place, needed in zip(places, [True] * len(places) if need is None else need, strict=True):
        args[place].requires_grad_(needed)
    return args


def sources(args: Sequence[Any]) -> list[Tensor]:
    """Those that require a gradient."""
    return [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]


def is_float(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point()


def gradients(value: Tensor, args: Sequence[Any], seed: int = 0) -> list[Tensor]:
    """Gradients of the arguments that require one, under a fixed random dout."""
    dout = torch.rand(
        value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return list(torch.autograd.grad(value, sources(args), dout.to(value)))


def assert_within_budget(case: Case, errors: Sequence[numerics.Error]) -> None:
    failed = [error.detail for error in errors if not error.ok]
    assert not failed, "\n".join([case.id, *failed])


class Calls(TorchDispatchMode):
    """Records the calls of this package's operators; optionally sends one direction to another
    backend."""

    def __init__(self, **reroute: str) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], Any]] = []  # operator, arguments, results
        self._reroute = reroute

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "kdkernels":
            return func(*args, **(kwargs or {}))
        direction = func._opname.rpartition("_")[2]
        args = (*args[:-1], self._reroute.get(direction, args[-1]))
        results = func(*args, **(kwargs or {}))
        self.made.append((func, args, results))
        return results

    def names(self) -> list[str]:
        return [func._opname for func, _, _ in self.made]


def operators(op: str) -> list[str]:
    """The operator of the forward and, unless that one computes the gradient, of the backward."""
    names = [f"{op}_fwd", f"{op}_bwd"]
    return [name for name in names if hasattr(torch.ops.kdkernels, name)]


def needed(call: tuple[Any, tuple[Any, ...], Any]) -> list[tuple[bool, Tensor]]:
    """Of an operator's call, each flag `need_<argument>` with the result `d<argument>`.

    A backward without flags runs only where its one gradient is needed. A forward that returns the
    derivative as the residual `dloss` is not counted: its backward returns the gradient.
    """
    func, args, results = call
    schema = func._schema
    results = results if isinstance(results, (tuple, list)) else (results,)
    if func._opname.endswith("_bwd") and not any(
        a.name.startswith("need_") for a in schema.arguments
    ):
        return [(True, result) for result in results]
    by_name = {found.name: result for found, result in zip(schema.returns, results, strict=True)}
    flags = zip(schema.arguments, args, strict=True)
    return [
        (flag, by_name["d" + argument.name.removeprefix("need_")])
        for argument, flag in flags
        if argument.name.startswith("need_") and "d" + argument.name[5:] in by_name
    ]


def recorded(case: Case) -> list[tuple[Any, tuple[Any, ...], Any]]:
    """Operator, arguments and results of the calls of one forward and backward, detached."""
    with Calls() as calls:
        args = leaves(case)
        gradients(case.call(*args), args)
    assert calls.names() == operators(case.info.op)
    return [
        (func, tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args), results)
        for func, args, results in calls.made
    ]
