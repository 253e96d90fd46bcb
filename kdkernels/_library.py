# SPDX-License-Identifier: Apache-2.0
"""The operators of the package, for torch: `kdkernels::<op>_fwd` and `kdkernels::<op>_bwd`.

An operator has one schema and one fake, however many backends implement it. The backend is an
argument of the operator and is chosen inside it, on real tensors, so a traced graph holds for every
backend. `kdkernels/ops/<op>.py` attaches autograd to the operators from outside.

Operators are registered by `Library.define` and `Library.impl`: a call through
`torch.library.custom_op` takes three times as long.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from kdkernels import _allocation, _dispatch
from kdkernels._checks import wants_gradient
from kdkernels._function import KernelFunction, keep_for_backward, kept, one_by_one

_library = torch.library.Library("kdkernels", "DEF")


def define_operator(
    op: str, direction: str, schema: str, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `kdkernels::<op>_<direction>` and return what calls it.

    Under `torch.compile` a float may change from step to step, but an operator's float is a
    constant of the graph, and each of its values would make one more graph. So an operator with
    floats has a second overload `Tensor`, which takes each of them as a tensor, and is what a graph
    calls where a float is symbolic.

    Args:
        op: Base name of the op, the same in every layer.
        direction: "fwd" or "bwd", or the name of what else the op has, e.g. "encode".
        schema: Arguments and results, e.g. `"(Tensor x, str backend) -> Tensor"`. The first
            argument is a tensor, the last one `str backend`; a backend's launcher receives all but
            the last.
        fake: Shapes and dtypes of the results, from the same arguments.
    """
    name = f"{op}_{direction}"

    def run(*args: Any) -> Any:
        *inputs, backend = args
        launch = getattr(_dispatch.select(op, backend, tuple(inputs)), name)
        try:
            with autocast_off(inputs[0].device.type):
                return launch(*inputs)
        except (RuntimeError, MemoryError) as error:
            found = _allocation.refused(error, packet.default, args, fake)
            if found is None:
                raise
            raise found from error

    _register(name, schema, run, fake)
    packet = getattr(torch.ops.kdkernels, name)
    torch.library.register_vmap(f"kdkernels::{name}", one_by_one(packet.default), lib=_library)
    arguments = packet.default._schema.arguments
    floats = frozenset(i for i, a in enumerate(arguments) if str(a.type) == "float")
    if not floats:
        return packet.default

    def run_on_tensors(*args: Any) -> Any:
        return run(*(arg.item() if i in floats else arg for i, arg in enumerate(args)))

    _register(f"{name}.Tensor", re.sub(r"\bfloat ", "Tensor ", schema), run_on_tensors, fake)
    constant, changing = packet.default, packet.Tensor

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() and not all(has_static_value(args[i]) for i in floats):
            return changing(*(_tensor(x) if i in floats else x for i, x in enumerate(args)))
        return constant(*args)

    return call


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdkernels::{name}", fake, lib=_library)


def _tensor(value: float) -> Tensor:
    """A symbolic float on the CPU, where reading it waits for no device.

    It is a sum, which AOTAutograd turns into one of tensors; for `torch.scalar_tensor(value)` and
    its like it makes the float a constant again (torch 2.13).
    """
    return torch.zeros((), dtype=torch.float64, device="cpu") + value


def autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Inside an operator the dtypes are decided: a product there must not be cast down."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class _Refusal(KernelFunction):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        keep_for_backward(ctx)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "kdkernels losses are differentiable once: the gradient of a gradient "
            "(create_graph=True) is not implemented. Use the function of the same name in "
            "kdkernels.reference, which torch differentiates twice"
        )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run `backward(ctx, kept, *douts)` without recording it, with the tensors that
    `keep_for_backward` was given, and refuse to differentiate what it returns.

    `torch.autograd.function.once_differentiable` refuses only if the incoming gradient requires
    grad (torch 2.13); with create_graph=True it lets the dependence on the saved inputs vanish
    silently.
    """

    def wrapper(ctx: Any, *douts: Tensor | None) -> Any:
        if all(dout is None for dout in douts):  # possible after `constant_results`
            return (None,) * len(ctx.needs_input_grad)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, kept(ctx), *douts)
        tensors = kept(ctx)
        sources = [x for x in (*tensors, *douts) if x is not None and wants_gradient(x)]
        with torch.no_grad():
            grads = backward(ctx, tensors, *douts)
        if not sources:
            return grads
        return tuple(grad if grad is None else _Refusal.apply(grad, *sources) for grad in grads)

    return wrapper
