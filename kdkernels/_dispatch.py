# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an operator, and why.

A backend is a package `kdkernels.<backend>`, which says what it can run at all: `unavailable()` and
`rejects(tensors)` return None for yes, or a sentence saying why not: the latter knows devices,
whatever the op does. The launchers `<op>_fwd` and `<op>_bwd` of an op are in the module
`kdkernels.<backend>.<op>`, or in what the package's function `launchers(op)` returns, if it has one
(None: the op has no kernel there). Where a backend limits an op, `supports(*operator_args)` beside
the launchers answers like `rejects`. Nothing is registered: a file in the right place is the
registration.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdkernels import _checks

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[str, ...] = tuple(name for name in get_args(Backend) if name != "auto")

# What `auto` tries, best first. The order on the CPU is measured (benchmarks/results). The order on
# a GPU is chosen, not measured yet. Whoever changes one brings the benchmark.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
_OTHER_DEVICES = ("reference",)
# Types of what operators take besides tensors. Every argument of every call is looked up here,
# which takes less time than isinstance.
_OPTIONS = frozenset((str, int, float, bool, type(None)))


class BackendUnavailableError(RuntimeError, ValueError):
    """An explicitly requested backend cannot run this call.

    A `ValueError`, because an argument asked for it, and a `RuntimeError`, because the same call
    may work on another machine.
    """


class _Requested(threading.local):
    """The innermost `use_backend` of this thread."""

    # threading.local, because Dynamo cannot trace ContextVar.get (torch 2.13)

    backend: str | None = None


_requested = _Requested()
_default = os.environ.get("KDKERNELS_BACKEND", "auto")


def _check_name(backend: Any, origin: str) -> str:
    _checks.choice(origin, backend, get_args(Backend))
    return backend


_check_name(_default, "KDKERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Make `backend` the choice of every call in this thread that does not name one itself.

    Precedence: the `backend=` argument of the call, then the innermost `use_backend`, then the
    environment variable `KDKERNELS_BACKEND` (read when the package is imported), then the
    order chosen for the device (`ORDER`).

    Raises:
        ValueError: unknown name. Whether the backend can run a given call is decided at that call.
    """
    _check_name(backend, "backend")
    outer, _requested.backend = _requested.backend, backend
    try:
        yield
    finally:
        _requested.backend = outer


def requested_backend(backend: str) -> str:
    """The name that a call with this `backend=` argument asks for: a backend, or "auto"."""
    if isinstance(backend, str) and backend == "auto":
        return _requested.backend or _default
    return _check_name(backend, "backend")


@dataclass(frozen=True)
class TensorForm:
    """A tensor that an operator would take, described without being computed. `rejects` and
    `supports` receive tensors or forms, and look at nothing else."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def form(
    x: Tensor, *, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
) -> TensorForm:
    """The form of a tensor, or of one made from it in another dtype or shape."""
    return TensorForm(tuple(x.shape if shape is None else shape), dtype or x.dtype, x.device)


@dataclass(frozen=True)
class Implementation:
    """The launchers of an op on a backend, and what they accept."""

    launchers: Any
    rejects: Callable[[list[Any]], str | None]
    supports: Callable[..., str | None] | None


@cache
def implementation(op: str, backend: str) -> Implementation | str:
    """An op on a backend, or why this installation has none. Imports the backend on first use."""
    package_name = f"kdkernels.{backend}"
    if importlib.util.find_spec(package_name) is None:
        return f"this version has no {backend} kernels"
    package = importlib.import_module(package_name)
    reason = package.unavailable()
    if reason is not None:
        return reason
    find = getattr(package, "launchers", None)
    launchers = _module(f"{package_name}.{op}") if find is None else find(op)
    if launchers is None:
        return f"{op} has no {backend} kernel"
    return Implementation(launchers, package.rejects, getattr(launchers, "supports", None))


def _module(name: str) -> ModuleType | None:
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)


def why_not(op: str, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why a backend cannot run an operator on these arguments; None if it can."""
    found = implementation(op, backend)
    if isinstance(found, str):
        return found
    reason = found.rejects([arg for arg in args if type(arg) not in _OPTIONS])
    return found.supports(*args) if reason is None and found.supports is not None else reason


def device_order(device: torch.device) -> tuple[str, ...]:
    """The backends that `auto` considers on a device, best first."""
    return ORDER.get(device.type, _OTHER_DEVICES)


def select_name(op: str, backend: str, args: tuple[Any, ...]) -> str:
    """The backend that runs an operator on these arguments, the first of which is a tensor.

    Raises:
        BackendUnavailableError: an explicit request that cannot be met, with the reason.
    """
    device = args[0].device
    if backend != "auto":
        reason = why_not(op, backend, args)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend must be one that can run {op} on {device}, got {backend!r}: {reason}"
            )
        return backend
    for name in device_order(device):
        if why_not(op, name, args) is None:
            return name
    raise BackendUnavailableError(f"no backend can run {op} on {device}")


def select(op: str, backend: str, args: tuple[Any, ...]) -> Any:
    """The launchers that run an operator on these arguments; raises like `select_name`."""
    found = implementation(op, select_name(op, backend, args))
    assert isinstance(found, Implementation)
    return found.launchers


@dataclass(frozen=True)
class _Planner:
    public: Callable[..., Any]
    op: Callable[..., str]
    operator_args: Callable[..., tuple[Any, ...]]
    choices: Callable[..., dict[str, str]]


_planners: dict[str, _Planner] = {}


def explained_by(
    operator_args: Callable[..., tuple[Any, ...]],
    choices: Callable[..., dict[str, str]],
    op: str | Callable[..., str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a public function with what `explain` asks. No tensor is computed or read there.

    Each of the three is called with all arguments of the public function by name, defaults
    included, less `backend`.

    Args:
        operator_args: Checks the arguments and returns those of the forward operator, without the
            backend: a `TensorForm` in the place of each tensor.
        choices: Names each choice made on the way and the reason, e.g. `{"algorithm": "factored
            (asked for)"}`.
        op: Basename of the operator, or what names it; by default that of the module.
    """

    def register(public: Callable[..., Any]) -> Callable[..., Any]:
        name = op or public.__module__.rpartition(".")[2]
        op_of = name if callable(name) else lambda **_: name
        _planners[public.__name__] = _Planner(public, op_of, operator_args, choices)
        return public

    return register


@dataclass(frozen=True)
class Plan:
    """What a call would run, but for the backend."""

    op: str
    operator_args: tuple[Any, ...]  # of the forward operator, `TensorForm` for tensors
    choices: dict[str, str]

    @property
    def device(self) -> torch.device:
        return self.operator_args[0].device


def plan(function: str, *args: Any, **kwargs: Any) -> Plan:
    """Checks the arguments of a public function and describes those of its operator, less the
    backend. Choices may depend on the backend that the call asks for.

    Raises:
        ValueError: unknown function, or arguments that the function itself would refuse.
    """
    if function not in _planners:
        raise ValueError(
            f"function must be one of {', '.join(map(repr, sorted(_planners)))}, got {function!r}"
        )
    planner = _planners[function]
    bound = inspect.signature(planner.public).bind(*args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    with use_backend(requested_backend(named.pop("backend", "auto"))):
        operator_args = planner.operator_args(**named)  # it checks what the others read
        return Plan(planner.op(**named), operator_args, planner.choices(**named))


@dataclass(frozen=True)
class Explanation:
    """The answer of `kd.explain`; its text is meant to be read, its fields to be tested."""

    function: str
    device: str
    backend: str
    choices: dict[str, str]
    rejected: dict[str, str]  # backend -> why it does not run this call

    def __str__(self) -> str:
        lines = [f"{self.function} on {self.device}", f"  backend    {self.backend}"]
        lines += [f"  {name:<10} {choice}" for name, choice in self.choices.items()]
        lines += [f"  not {name:<9} {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


def explain(function: str, *args: Any, backend: Backend = "auto", **kwargs: Any) -> Explanation:
    """Say which backend and algorithm a call would use, and why not the others.

    Nothing is computed and no tensor is allocated. Shapes, dtypes, devices and options are checked
    as the call itself does; numbers inside tensors (labels, indices, `num_keys`) are not read, so a
    call that refuses one of them can still be explained.

    Args:
        function: Name of a public function, e.g. `"gram_mse"`.
        *args, **kwargs: The arguments of that call.
        backend: As in that call.

    Raises:
        TypeError, ValueError: unknown function, or arguments that the function itself would refuse.
        BackendUnavailableError: `backend` names one that cannot run the call.

    Example:
        >>> print(kd.explain("gram_mse", student, teacher))
    """
    planned = plan(function, *args, **kwargs, backend=backend)
    op, device = planned.op, planned.device
    chosen = select_name(op, requested_backend(backend), planned.operator_args)
    order = device_order(device)
    rejected = {}
    for name in (*order, *(name for name in BACKENDS if name not in order)):
        if name != chosen:
            reason = why_not(op, name, planned.operator_args)
            rejected[name] = reason or (
                f"{chosen} comes before it on {device.type}"
                if name in order
                else f"not chosen by auto on {device.type}"
            )
    return Explanation(function, str(device), chosen, planned.choices, rejected)
