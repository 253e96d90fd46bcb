# SPDX-License-Identifier: Apache-2.0
"""One `OpInfo` per public function drives the generic tests, `kdkernels check` and the
benchmarks."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kdkernels._checks import accumulation_dtype


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. `name` is a word of the shape vocabulary, e.g. "ragged_all"."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    # The result is a difference of nearly equal numbers, judged against their size
    # (`OpInfo.magnitude`).
    cancels: bool = False


@dataclass(frozen=True)
class BadInput:
    """A call that must raise before any work, and what the message must contain."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    error: type[Exception]
    message: str  # a substring: the argument, the expectation and the value


@dataclass(frozen=True)
class Cost:
    """The least work of the best known algorithm, forward and backward together."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Product:
    """The matrix products that an op's time is compared with, "mm" in a benchmark. Rows of the
    result belong to rows of the first tensor, so that a part of those is a part of the work."""

    function: Callable[..., Tensor]  # of the sample's tensors
    flops: Callable[..., float]  # of the same


def _gram_flops(x: Tensor, *_: Any) -> float:
    return 2.0 * x.numel() * x.shape[-2]


GRAM = Product(lambda x, *_: x @ x.mT, _gram_flops)  # which the obvious way starts with


@dataclass(frozen=True)
class Eager:
    """How a user writes an op in torch, where that is not the definition on the same tensors."""

    function: Callable[[Sample], Callable[..., Tensor]]  # of the prepared sample's tensors
    prepare: Callable[[Sample], Sample]  # what is kept between steps, made before the clock starts


@dataclass(frozen=True)
class ByRows:
    """How a loss, as a benchmark times it, comes from some of its rows at a time: it is the sum of
    the rows' losses over a divisor."""

    # of a sample and the indices [R] of rows: [R], differentiable in the first argument
    losses: Callable[[Sample, Tensor], Tensor]
    divisor: Callable[[Tensor], Tensor | float]  # of the losses of all rows
    independent: bool = False  # a row's gradient comes from its own loss alone


@dataclass(frozen=True)
class BenchShape:
    """A named workload."""

    name: str
    sizes: dict[str, int]
    workload: str  # where these sizes come from
    kwargs: dict[str, Any] = field(default_factory=dict)
    device: str | None = None  # the only device type that it is meant for


@dataclass(frozen=True)
class OpInfo:
    name: str  # of the public function, and what sets this use of it apart
    op: str  # basename of the operator, or the pair of them
    function: Callable[..., Any]  # public; takes backend=
    # that of the public function in kdkernels.reference
    definition: Callable[..., Any]
    diff_args: tuple[str, ...]  # what can require a gradient: the first floating-point arguments
    samples: Callable[[torch.device, torch.dtype], Iterable[Sample]]
    bad_inputs: Callable[[torch.device], Iterable[BadInput]]
    bench: tuple[BenchShape, ...]
    bench_sample: Callable[[BenchShape, torch.device, torch.dtype], Sample]
    cost: Callable[[BenchShape, torch.dtype], Cost]
    # Size of the numbers whose difference a cancelling sample returns: (of the loss, of each
    # gradient in diff_args, or of each of its rows); None for its own size.
    magnitude: Callable[[Sample], tuple[float | None, tuple[float | Tensor | None, ...]]] | None = (
        None
    )
    # Every loss is a difference, judged against `magnitude` as those of cancelling samples are.
    subtracts: bool = False
    # Peak bytes that a benchmark variant (a baseline, a backend or a peer) needs above its
    # inputs, roughly: whether to start it at all. None: never much.
    memory: Callable[[BenchShape, torch.dtype, str], float] | None = None
    # Candidates are ranked, so where some are equally far rounding decides which one's gradient it
    # is. A zero row, equally far from all unit rows, is such a case.
    selects: bool = False
    # Which rows of the only differentiable argument get a gradient that depends on a choice between
    # candidates at almost the same distance, [rows] bool. None: no candidate is chosen.
    contested: Callable[[Sample], Tensor] | None = None
    # The result has the dtype of the features; of a loss it is fp32, fp64 for fp64.
    keeps_dtype: bool = False
    # Whether the backward reads the result of a sample, as that of torch.exp does: changing it in
    # place before the backward is then refused by autograd. None: never.
    keeps_result: Callable[[Sample], bool] | None = None
    # Minus infinity is a value like others: the logit of a class that is ruled out.
    takes_minus_inf: bool = False
    # What `bench.BASELINES` names, less what makes no sense for the op.
    baselines: tuple[str, ...] = ("eager", "compile", "mm")
    eager: Eager | None = None  # what "eager" and "compile" time; None: the definition
    product: Product = GRAM  # what "mm" times
    by_rows: ByRows | None = None  # in fp64, what a benchmark's errors are measured against
    # Options that choose an algorithm, not a meaning: the definition does not take them.
    algorithm_options: tuple[str, ...] = ("algorithm",)
    # Distributions that do the same work or a part, timed where installed, and other ways to do
    # it in torch (kdkernels.testing.peers).
    peers: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    @property
    def public(self) -> str:
        """Name of the public function."""
        return self.function.__name__

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of the result for features of a dtype."""
        return dtype if self.keeps_dtype else accumulation_dtype(dtype)

    def places(self, args: tuple[Any, ...]) -> dict[str, int]:
        """Where the differentiable arguments are; the last ones may be left out."""
        floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        return dict(zip(self.diff_args, floats, strict=False))

    def define(self, sample: Sample, args: tuple[Any, ...] | None = None) -> Any:
        """The definition's value of a sample, on other arguments if given."""
        kwargs = {
            name: value
            for name, value in sample.kwargs.items()
            if name not in self.algorithm_options
        }
        return self.definition(*(sample.args if args is None else args), **kwargs)


def rng(seed: int) -> torch.Generator:
    """A CPU generator: samples are drawn on the CPU in fp64 and moved, so every backend sees the
    same numbers."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, the same on every device and, up to rounding, in every dtype."""
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(device, dtype)


def network_features(
    *shape: int,  # [..., B, D]
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    offset: float = 1.0,
    spread: float = 0.3,
    distance: float = 0.0,
) -> Tensor:
    """Features as networks give them: after a ReLU, pooled, around a mean that all rows share.
    Normal numbers hide what rounding does to them.

    Feature j has the mean `offset` + u_j, u_j uniform in [0, 1), and the deviation `spread`, before
    the ReLU. `distance` is the deviation of noise that is added there: it makes the features of a
    student where the same call without it makes those of its teacher.
    """

    def noise(k: int) -> Tensor:
        return torch.randn(*shape, generator=rng(3 * seed + k), dtype=torch.float64)

    mean = offset + torch.rand(shape[-1], generator=rng(3 * seed), dtype=torch.float64)
    return torch.relu(mean + spread * noise(1) + distance * noise(2)).to(device, dtype)


def clustered(x: Tensor, spread: float, seed: int = 0) -> Tensor:
    """Rows that lie `spread` apart in clusters of about three, around points that are ten times as
    far out as the rows of x. A spread of 0 gives duplicates."""
    rows = x.shape[-2]
    centres = 10 * x.double()[..., torch.arange(rows) % max(min(rows, 4), rows // 3), :]
    noise = torch.randn(x.shape, generator=rng(seed), dtype=torch.float64).to(x.device)
    return (centres + spread * noise).to(x.dtype)


@cache
def opinfos() -> tuple[OpInfo, ...]:
    """Every OpInfo of the package, found in `kdkernels/testing/opinfos/`."""
    package = importlib.import_module("kdkernels.testing.opinfos")
    found: list[OpInfo] = []
    modules = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    for module in (name for name in modules if not name.startswith("_")):
        found += importlib.import_module(f"{package.__name__}.{module}").OPINFOS
    return tuple(found)
