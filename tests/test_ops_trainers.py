# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, trainers: what training loops do around a loss, and every op must bear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, each_case, few, gradients, leaves
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ONE = {"pick": lambda found: few(found)[:1]}  # where the options of a call make no difference


def _copy(x: Tensor) -> Tensor:
    """With the strides of the original, since results depend on them in the last bit."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _constants(case: Case) -> list[int]:
    """Places of the tensors other than the first differentiable one."""
    first = next(iter(case.places.values()))
    return [i for i, arg in enumerate(case.sample.args) if isinstance(arg, Tensor) and i != first]


def _with_options_under_inference_mode(case: Case) -> dict[str, Any]:
    with torch.inference_mode():
        return {
            name: _copy(value)
            for name, value in case.sample.kwargs.items()
            if isinstance(value, Tensor) and not value.requires_grad
        }


@each_case()
def test_constants_made_under_inference_mode(case: Case) -> None:
    """A frozen teacher runs under inference mode; so may what makes labels, keys and indices."""
    first, *_ = case.places.values()
    args = leaves(case, [True] + [False] * (len(case.places) - 1))
    for place in _constants(case):  # a copy in both calls: results may depend on the alignment
        args[place] = _copy(case.sample.args[place])
    value = case.call(*args)
    (wanted,) = gradients(value, args)
    for place in _constants(case):
        with torch.inference_mode():
            args[place] = _copy(args[place])
    found = case.call(*args, **_with_options_under_inference_mode(case))
    assert torch.equal(found, value)
    assert torch.equal(gradients(found, args)[0], wanted)
    assert args[first].is_inference() is False


@each_case()
def test_results_may_be_changed_in_place(case: Case) -> None:
    """`loss /= accumulation_steps` is what many loops write."""
    args = leaves(case)
    value = case.call(*args)
    before, wanted = value.detach().clone(), gradients(value * 0.5, args)
    changed = case.call(*args)
    if case.info.keeps_result is not None and case.info.keeps_result(case.sample):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(changed.mul_(0.5), args)
        return
    changed *= 0.5
    assert torch.equal(changed, before * 0.5)
    for got, expected in zip(gradients(changed, args), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@each_case(**ONE)
def test_inside_a_checkpointed_block(case: Case, reentrant: bool) -> None:
    args = leaves(case)
    wanted = gradients(case.call(*args), args)
    args = leaves(case)
    value = checkpoint(lambda *inner: case.call(*inner), *args, use_reentrant=reentrant)
    dout = torch.rand(
        value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(value)
    value.backward(dout)
    got = [args[place].grad for place in case.places.values()]
    for grad, expected in zip(got, wanted, strict=True):
        assert torch.equal(grad, expected)


@each_case(**ONE)
def test_a_checkpointed_gradient_with_a_graph(case: Case) -> None:
    args = leaves(case)
    value = checkpoint(lambda *inner: case.call(*inner), *args, use_reentrant=False)
    asking = [args[place] for place in case.places.values()]
    grads = torch.autograd.grad(value.sum(), asking, create_graph=True)
    plain = leaves(case)
    wanted = torch.autograd.grad(
        case.call(*plain).sum(), [plain[place] for place in case.places.values()]
    )
    for grad, expected in zip(grads, wanted, strict=True):
        assert torch.equal(grad, expected)
