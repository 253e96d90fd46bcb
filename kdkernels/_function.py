# SPDX-License-Identifier: Apache-2.0
"""The base of the package's autograd functions: what they keep for the backward, and what they do
under the transforms of `torch.func`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def keep_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, which refuses tensors that were made under `torch.inference_mode()`.

    Such a tensor has no version counter and asks for no gradient, so `ctx` itself may hold it; a
    change of it before the backward goes unnoticed, as everywhere in torch.
    """
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "torch.compile loses the gradient of an autograd function under torch.func (torch "
                "2.13): leave transforms of kdkernels losses out of what is compiled"
            )
        ctx.unwatched = None  # Dynamo cannot trace is_inference (torch 2.13)
        ctx.save_for_backward(*tensors)
        return
    unwatched = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.unwatched = unwatched or None
    ctx.save_for_backward(*(None if i in unwatched else x for i, x in enumerate(tensors)))


def kept(ctx: Any) -> tuple[Tensor | None, ...]:
    """What `keep_for_backward` was given. To be called once in a backward: saved tensors that
    `torch.utils.checkpoint` computes again may be read once only."""
    if ctx.unwatched is None:
        return ctx.saved_tensors
    return tuple(ctx.unwatched.get(i, x) for i, x in enumerate(ctx.saved_tensors))


def constant_results(ctx: Any, *results: Tensor) -> None:
    """`ctx.mark_non_differentiable`, and their gradients come as None: torch would make zeros in
    every call."""
    ctx.mark_non_differentiable(*results)
    if not torch.compiler.is_compiling():  # Dynamo does not know the method (torch 2.13)
        ctx.set_materialize_grads(False)


class KernelFunction(torch.autograd.Function):
    """An autograd function with `forward(ctx, ...)`, which `torch.func` can transform too.

    torch transforms only functions that save arguments and results and nothing else. Returning
    every residual as a result would cost each call in eager mode its time, so it is done under a
    transform only, by `_Transformed`. There the forward runs on plain tensors. Whether an argument
    asks for a gradient is not seen in them, so it has to be an argument itself
    (`_checks.wants_gradient`).
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        # Dynamo calls the apply of torch.autograd.Function in the place of this one (torch 2.13)
        if not torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        call = _Call(cls)
        results = _Transformed.apply(call, *args)[: call.count]
        return results if call.several else results[0]


class _Context:
    """Stands in for the `ctx` of a function: in its forward it notes what torch has to know, in its
    backward it has what torch gives."""

    non_differentiable: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Zeros are made for the one derivative that torch takes of the whole."""


class _Call:
    """One call of a function under a transform, and what its forward leaves for the backward."""

    def __init__(self, function: type[KernelFunction]) -> None:
        self.function = function

    def forward(self, *args: Any) -> tuple[Any, ...]:
        """The results, then the tensors to be kept that are neither arguments nor results."""
        ctx = _Context()
        results = self.function.forward(ctx, *args)
        self.several = isinstance(results, tuple)
        results = results if self.several else (results,)
        self.count = len(results)
        self.non_differentiable = [
            any(x is found for found in ctx.non_differentiable) for x in results
        ]
        known = [*args, *results]
        place = {id(x): i for i, x in enumerate(known) if isinstance(x, Tensor)}
        self.kept_places: list[int | None] = []
        for x in kept(ctx):
            if x is not None and id(x) not in place:
                place[id(x)] = len(known)
                known.append(x)
            self.kept_places.append(None if x is None else place[id(x)])
        self.context = ctx
        ctx.saved_tensors = ctx.non_differentiable = ()  # tensors are kept by torch
        ctx.unwatched = None
        return tuple(known[len(args) :])


class _Transformed(torch.autograd.Function):
    """A `KernelFunction` in the form that torch transforms."""

    @staticmethod
    def forward(call: _Call, *args: Any) -> tuple[Any, ...]:
        return call.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, *args = inputs
        known = (*args, *output)
        keep_for_backward(ctx, *(None if i is None else known[i] for i in call.kept_places))
        ctx.call = call
        constant = [x for x, yes in zip(output, call.non_differentiable, strict=False) if yes]
        ctx.mark_non_differentiable(*constant, *output[call.count :])

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Any, ...]:
        call = ctx.call
        context = copy.copy(call.context)
        context.saved_tensors, context.unwatched = ctx.saved_tensors, ctx.unwatched
        context.needs_input_grad = ctx.needs_input_grad[1:]
        grads = call.function.backward(context, *douts[: call.count])
        return None, *(grads if isinstance(grads, tuple) else (grads,))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "kdkernels losses have no forward-mode derivative (torch.func.jvp, jacfwd, linearize): "
            "take torch.func.grad, vjp or jacrev"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *args: Any) -> Any:
        def one(*args: Any) -> tuple[Any, ...]:
            return _Transformed.apply(call, *args)

        return one_by_one(one)(info, in_dims[1:], *args)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule by which `torch.vmap` calls a function of tensors: once per entry of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        def entry(i: int) -> Any:
            return function(
                *(
                    arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )

        if info.batch_size == 0:
            raise ValueError("the dimension that torch.vmap runs over must not be empty")
        results = [entry(i) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
