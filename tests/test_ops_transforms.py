# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, the transforms of `torch.func`: gradients, batches, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, each_case, few, gradients, leaves
from torch import Tensor

from kdkernels import _dispatch

# A transform ends at the operators: what it does is the same for all backends.
ALL = {"backends": ("reference",)}
ONE = {"pick": lambda found: few(found)[:1], "backends": ("reference",)}
KERNELS = tuple(backend for backend in _dispatch.BACKENDS if backend != "reference")
COUNT = 3  # entries of a batch


def _function(case: Case) -> Callable[..., Tensor]:
    """The public function of the arguments that can require a gradient."""

    def call(*sources: Tensor) -> Tensor:
        args = list(case.sample.args)
        for place, source in zip(case.places.values(), sources, strict=True):
            args[place] = source
        return case.call(*args)

    return call


def _sources(case: Case) -> list[Tensor]:
    return [case.sample.args[place].detach() for place in case.places.values()]


def _batch(case: Case) -> list[Tensor]:
    """Batches of each source, along the last dimension of the first one and the first of others."""
    entries = [[source * (1 + i / 8) for i in range(COUNT)] for source in _sources(case)]
    return [torch.stack(each, 0 if i else -1) for i, each in enumerate(entries)]


def _in_dims(case: Case) -> tuple[int, ...]:
    return tuple(0 if i else -1 for i in range(len(case.places)))


def _entries(batch: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """The same, without torch.vmap."""
    return [tuple(x[i] if k else x[..., i] for k, x in enumerate(batch)) for i in range(COUNT)]


def _by_autograd(case: Case, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    sources = [source.detach().requires_grad_() for source in sources]
    return torch.autograd.grad(_function(case)(*sources).sum(), sources)


def _scalar(case: Case) -> Callable[..., Tensor]:
    function = _function(case)
    return lambda *sources: function(*sources).sum()


def _argnums(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.places)))


def _same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@each_case(**ALL)
def test_gradients_are_those_of_autograd(case: Case) -> None:
    args = leaves(case)
    value = case.call(*args)
    expected = gradients(value, args)
    found, pull = torch.func.vjp(_function(case), *_sources(case))
    assert torch.equal(found, value)
    dout = torch.rand(
        value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )  # of `gradients`
    assert _same(pull(dout.to(value)), expected)


@each_case(pick=ONE["pick"], backends=KERNELS)
def test_gradients_of_kernels(case: Case) -> None:
    expected = _by_autograd(case, _sources(case))
    assert _same(torch.func.grad(_scalar(case), _argnums(case))(*_sources(case)), expected)


@each_case(**ONE)
def test_grad_and_value(case: Case) -> None:
    expected = _by_autograd(case, _sources(case))
    found, value = torch.func.grad_and_value(_scalar(case), _argnums(case))(*_sources(case))
    assert torch.equal(value, _scalar(case)(*_sources(case)))
    assert _same(found, expected)


@each_case(**ONE)
def test_gradient_of_one_argument(case: Case) -> None:
    """Of each alone, the others constant, or with a gradient of autograd that nobody asks for."""
    expected = _by_autograd(case, _sources(case))
    for i, wanted in enumerate(expected):
        for others_ask in (False, True):
            sources = [source.requires_grad_(others_ask) for source in _sources(case)]
            found = torch.func.grad(_scalar(case), i)(*sources)
            assert torch.equal(found, wanted)


@each_case(**ONE)
def test_jacobian(case: Case) -> None:
    sources = _sources(case)
    found = torch.func.jacrev(_function(case), _argnums(case))(*sources)
    value = _function(case)(*sources)
    for row in range(min(value.numel(), 3)):
        args = [source.detach().requires_grad_() for source in sources]
        entry = _function(case)(*args).flatten()[row]
        wanted = torch.autograd.grad(entry, args)
        rows = tuple(
            each.reshape(value.numel(), *x.shape)[row]
            for each, x in zip(found, sources, strict=True)
        )
        assert _same(rows, wanted)


@each_case(**ONE)
def test_batches(case: Case) -> None:
    batch = _batch(case)
    function = _function(case)
    expected = torch.stack([function(*entry) for entry in _entries(batch)])
    assert torch.equal(torch.vmap(function, _in_dims(case))(*batch), expected)
    # labels, codes and indices of each entry too
    args = [torch.stack([x] * COUNT) if isinstance(x, Tensor) else x for x in case.sample.args]
    for place, x, dim in zip(case.places.values(), batch, _in_dims(case), strict=True):
        args[place] = x.movedim(dim, 0)
    dims = tuple(0 if isinstance(arg, Tensor) else None for arg in args)
    assert torch.equal(torch.vmap(case.call, dims)(*args), expected)


@each_case(**ALL)
def test_gradients_of_batches(case: Case) -> None:
    """One gradient per entry, and the gradient of a sum over entries."""
    batch, dims = _batch(case), _in_dims(case)
    wanted = [_by_autograd(case, entry) for entry in _entries(batch)]
    each = torch.vmap(torch.func.grad(_scalar(case), _argnums(case)), dims)(*batch)
    of_sum = torch.func.grad(
        lambda *sources: torch.vmap(_scalar(case), dims)(*sources).sum(), _argnums(case)
    )(*batch)
    for k in _argnums(case):
        stacked = torch.stack([gradient[k] for gradient in wanted])
        assert torch.equal(each[k], stacked)
        assert torch.equal(of_sum[k], stacked if k else stacked.movedim(0, -1))
    # one side for all entries
    one = torch.vmap(_scalar(case), (-1, *(None,) * (len(batch) - 1)))(
        batch[0], *_sources(case)[1:]
    )
    assert torch.equal(
        one,
        torch.stack([_scalar(case)(entry[0], *_sources(case)[1:]) for entry in _entries(batch)]),
    )


@each_case(**ONE)
def test_second_derivatives_are_refused(case: Case) -> None:
    sources = _sources(case)
    for first in _argnums(case):
        inner = torch.func.grad(_scalar(case), first)
        for second in _argnums(case):
            with pytest.raises(RuntimeError, match="differentiable once"):
                torch.func.grad(lambda *sources: inner(*sources).sum(), second)(*sources)  # noqa: B023
    asking = [source.requires_grad_() for source in _sources(case)]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(_scalar(case))(*asking).sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.jacrev(torch.func.jacrev(_scalar(case)))(*sources)


@each_case(**ONE)
def test_forward_mode_is_refused(case: Case) -> None:
    sources = tuple(_sources(case))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(_function(case), sources, sources)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.hessian(_scalar(case))(*sources)


@each_case(**ONE)
def test_an_empty_batch_is_refused(case: Case) -> None:
    batch = [x[:0] if i else x[..., :0] for i, x in enumerate(_batch(case))]
    with pytest.raises(ValueError, match="must not be empty"):
        torch.vmap(_function(case), _in_dims(case))(*batch)


@each_case(**ONE)
def test_transforms_inside_a_graph_are_refused(case: Case) -> None:
    """torch would return zeros."""
    gradient = torch.func.grad(_scalar(case))
    batches = torch.vmap(_scalar(case), _in_dims(case))
    for transformed, args in ((gradient, _sources(case)), (batches, _batch(case))):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="loses the gradient"):
            torch.compile(transformed, backend="eager", fullgraph=True)(*args)
