# SPDX-License-Identifier: Apache-2.0
"""The autograd function of losses whose operator returns the gradient together with the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdkernels._function import KernelFunction, constant_results, keep_for_backward
from kdkernels._library import first_order


class GradientInForward(KernelFunction):
    """Attaches such an operator to autograd: the backward scales what the forward has computed.

    `operator(*args)` returns the loss, then results without a derivative (counts), then the
    derivatives of the loss by the first `count` of its arguments. Each of those is a tensor, or
    None where the operator takes another argument in its place. What the function returns is the
    loss times `scale`, with the results without a derivative behind it.
    """

    @staticmethod
    def forward(ctx: Any, operator: Any, count: int, scale: float, *args: Any) -> Any:
        loss, *others = operator(*args)
        others, gradients = others[:-count], others[-count:]
        # the inputs only so that a change of them or a second derivative is refused
        keep_for_backward(ctx, *gradients, *args[:count])
        ctx.count, ctx.scale, ctx.dtype = count, scale, args[0].dtype
        loss = loss if scale == 1.0 else loss * scale
        if not others:
            return loss
        constant_results(ctx, *others)
        return loss, *others

    @staticmethod
    @first_order
    def backward(ctx: Any, kept: tuple[Tensor | None, ...], dout: Tensor, *_: Any) -> Any:
        dout = dout if ctx.scale == 1.0 else dout * ctx.scale
        _, _, _, *need = ctx.needs_input_grad
        grads = [None] * len(need)
        for i, gradient in enumerate(kept[: ctx.count]):
            if need[i]:
                grads[i] = (dout * gradient).to(ctx.dtype)
        return None, None, None, *grads
