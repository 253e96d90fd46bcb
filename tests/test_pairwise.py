# SPDX-License-Identifier: Apache-2.0
"""pairwise: what is special about it. The rest is in the generic tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import SHORT
from torch import Tensor

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels.ops.pairwise import METRICS
from kdkernels.reference import _pairwise as reference
from kdkernels.testing import numerics, peak
from kdkernels.testing.opinfo import BenchShape, randn

CPU = torch.device("cpu")
DISTANCES = ("euclidean", "sqeuclidean", "rbf")


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed, device=CPU, dtype=dtype)


BUILT = [
    name
    for name in _dispatch.BACKENDS
    if not isinstance(_dispatch.implementation("pairwise", name), str)
]


@pytest.fixture(params=BUILT)
def backend(request: pytest.FixtureRequest) -> str:
    reason = _dispatch.why_not("pairwise", request.param, (_draw(2, 2, seed=0), None, "dot", 1.0))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("metric", METRICS)
def test_rows_with_themselves(backend: str, metric: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = _draw(70, 19, seed=1, dtype=dtype) + 3
        out = kd.pairwise(x, metric=metric, gamma=0.1, backend=backend)
        assert torch.equal(out, out.mT), SHORT[dtype]
        assert torch.equal(out, kd.pairwise(x, x, metric=metric, gamma=0.1, backend=backend))
        if metric in DISTANCES:
            itself = 1.0 if metric == "rbf" else 0.0
            assert torch.equal(out.diagonal().float(), torch.full((70,), itself))


@pytest.mark.parametrize("metric", METRICS)
def test_both_sides_at_once_and_apart(backend: str, metric: str) -> None:
    """The gradient of f(x, x) is the sum of those by either side."""
    x, dout = _draw(37, 9, seed=1), _draw(37, 37, seed=2)

    def gradients(*args: Tensor) -> list[Tensor]:
        out = kd.pairwise(*args, metric=metric, gamma=0.1, backend=backend)
        return list(torch.autograd.grad(out, args, dout.to(out.dtype)))

    (together,) = gradients(x.clone().requires_grad_())
    apart = sum(gradients(x.clone().requires_grad_(), x.clone().requires_grad_()))
    wide = x.double().requires_grad_()
    value = reference.pairwise(wide, metric=metric, gamma=0.1)
    (hi,) = torch.autograd.grad(value, wide, dout.double())
    narrow = x.clone().requires_grad_()
    value = reference.pairwise(narrow, metric=metric, gamma=0.1)
    (low,) = torch.autograd.grad(value, narrow, dout)
    for what, got in (("together", together), ("apart", apart)):
        error = numerics.compare(what, got, hi, low, torch.float32)
        assert error.ok, error.detail


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("metric", DISTANCES)
def test_close_rows_of_far_clusters_keep_their_digits(
    backend: str, metric: str, in_batch: bool
) -> None:
    """Points 1e-3 apart in clusters at norm 10, judged among themselves, at their own scale."""
    centres = 10 * F.normalize(_draw(4, 16, seed=1, dtype=torch.float64), dim=1)
    cluster = torch.arange(40) % 4
    x, y = (
        (centres[cluster] + 2.5e-4 * _draw(40, 16, seed=seed, dtype=torch.float64)).float()
        for seed in (2, 3)
    )
    y = x if in_batch else y
    same = cluster[:, None] == cluster[None, :]
    kwargs = {"metric": metric, "gamma": 2e5}
    dout = torch.where(same, _draw(40, 40, seed=4, dtype=torch.float64), 0.0)

    def run(function: object, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        a = x.detach().to(dtype).requires_grad_()
        out = function(a, None if in_batch else y.to(dtype), **kwargs)
        return out.detach()[same], torch.autograd.grad(out, a, dout.to(dtype))[0]

    hi = run(reference.pairwise, torch.float64)
    low = run(reference.pairwise, torch.float32)
    got = run(lambda *args, **kw: kd.pairwise(*args, **kw, backend=backend), torch.float32)
    for what, *values in zip(("value", "gradient"), got, hi, low, strict=True):
        error = numerics.compare(what, *values, torch.float32)
        assert error.ok, error.detail


def test_euclidean_has_no_gradient_between_coincident_rows(backend: str) -> None:
    x = _draw(1, 6, seed=1).expand(35, -1).contiguous().requires_grad_()
    y = x.detach()[:33].clone().requires_grad_()
    for args in ((x,), (x, y)):
        out = kd.pairwise(*args, metric="euclidean", backend=backend)
        assert torch.equal(out, torch.zeros_like(out))
        for grad in torch.autograd.grad(out.sum(), args):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("metric", METRICS)
def test_a_side_without_rows(backend: str, metric: str) -> None:
    x, y = _draw(0, 4, seed=1).requires_grad_(), _draw(3, 4, seed=2).requires_grad_()
    for args in ((x, y), (y, x)):
        out = kd.pairwise(*args, metric=metric, backend=backend)
        assert out.shape == (len(args[0]), len(args[1]))
        for arg, grad in zip(args, torch.autograd.grad(out.sum(), args), strict=True):
            assert torch.equal(grad, torch.zeros_like(arg))


def test_leading_dimensions_are_independent(backend: str) -> None:
    x, y = _draw(2, 2, 2, 5, 3, seed=1), _draw(2, 2, 2, 4, 3, seed=2)
    out = kd.pairwise(x, y, metric="euclidean", backend=backend)
    assert out.shape == (2, 2, 2, 5, 4)
    assert torch.equal(out[1, 0, 1], kd.pairwise(x[1, 0, 1], y[1, 0, 1], metric="euclidean",
                                                 backend=backend))  # fmt: skip


def test_layout_of_a_dense_gradient_does_not_matter(backend: str) -> None:
    B = 20 if backend == "triton" else 70
    x = _draw(B, 9, seed=1).requires_grad_()
    for metric in ("euclidean", "cosine"):
        out = kd.pairwise(x, metric=metric, backend=backend)
        for dout in (
            torch.rand(()).expand(B, B),
            torch.rand(B).expand(B, B),
            torch.rand(B, B).mT,
            torch.rand(B, 2 * B)[:, ::2],
        ):
            (got,) = torch.autograd.grad(out, x, dout, retain_graph=True)
            (wanted,) = torch.autograd.grad(out, x, dout.contiguous(), retain_graph=True)
            assert torch.equal(got, wanted)


def test_choice_of_products() -> None:
    x = _draw(4, 3, seed=1)
    assert kd.explain("pairwise", x).choices == {"products": "half, by symmetry"}
    assert kd.explain("pairwise", x, x).choices == {"products": "half, by symmetry"}
    assert kd.explain("pairwise", x, x.clone()).choices == {"products": "all"}


def test_extra_memory_is_one_matrix() -> None:
    """No matrix of weights beside the values; only tiles and rows."""
    reason = peak.why_not(CPU)
    if reason is not None:
        pytest.skip(reason)
    B, D = 2048, 64
    shape = BenchShape("large", {"B": B, "D": D}, "", {"metric": "euclidean"})
    extra = peak.extra_mib("pairwise", shape, torch.float32, "fwd_bwd", "cpu", CPU)
    assert extra < 1.5 * B * B * 4 / peak.MIB
