# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, what only a GPU shows: no host synchronisation, graphs, and offsets beyond 32
bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, each_case, gradients, leaves, sources

import kdkernels as kd

CUDA = torch.device("cuda")
pytestmark = pytest.mark.gpu
ON_GPU: dict[str, Any] = {"devices": (CUDA,) if torch.cuda.is_available() else ()}


@each_case(**ON_GPU)
def test_nothing_waits_for_the_device(case: Case) -> None:
    args = leaves(case)
    gradients(case.call(*args), args)  # compiles
    dout = torch.ones_like(case.call(*args))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(case.call(*args), sources(args), dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_case(**ON_GPU)
def test_capture_and_replay(case: Case) -> None:
    args = leaves(case)
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(2):
            torch.autograd.grad(case.call(*args).sum(), sources(args))
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = case.call(*args)
        grads = torch.autograd.grad(value.sum(), sources(args))
    with torch.no_grad():
        for arg in sources(args):
            arg.copy_(arg.flip(-1))  # other numbers at the same addresses
    graph.replay()
    torch.cuda.synchronize()
    fresh = [arg.detach().clone().requires_grad_(arg.requires_grad) for arg in args]
    wanted = case.call(*fresh)
    assert torch.equal(value, wanted)
    for got, expected in zip(grads, torch.autograd.grad(wanted.sum(), sources(fresh)), strict=True):
        assert torch.equal(got, expected)


def test_graphed_callable_of_a_module() -> None:
    """The example of README.md."""
    plain = kd.nn.SimilarityPreservingLoss(weight=3000)
    sample = torch.randn(64, 128, device=CUDA, requires_grad=True), torch.randn(64, 128).to(CUDA)
    graphed = torch.cuda.make_graphed_callables(kd.nn.SimilarityPreservingLoss(weight=3000), sample)
    student, teacher = torch.randn(64, 128, device=CUDA), torch.randn(64, 128, device=CUDA)
    student.requires_grad_()
    value, wanted = graphed(student, teacher), plain(student, teacher)
    assert torch.equal(value, wanted)
    (grad,), (expected,) = (torch.autograd.grad(x, student) for x in (value, wanted))
    assert torch.equal(grad, expected)


@pytest.mark.large
@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
def test_offsets_beyond_32_bits(algorithm: str) -> None:
    """k copies of a batch divide gram_mse by k and its gradient by k^2 (tests/test_gram_mse.py), at
    any k."""
    B, D, k = 64, 1024, 33_000  # k B D is above 2^31
    if algorithm == "tiled":
        B, D, k = 64, 32_768, 1_030
    student = torch.randn(B, D, device=CUDA, dtype=torch.bfloat16)
    teacher = torch.randn(B, D, device=CUDA, dtype=torch.bfloat16)

    def run(s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s.requires_grad_()
        value = kd.gram_mse(s, t, algorithm=algorithm, backend="triton")
        return value.detach(), torch.autograd.grad(value * len(s), s)[0]  # in the range of bf16

    small, small_gradient = run(student.clone(), teacher)
    large, large_gradient = run(student.repeat(k, 1), teacher.repeat(k, 1))
    torch.testing.assert_close(large * k, small)
    # value * rows: gradients of the copies are 1 / k of the single batch's
    torch.testing.assert_close(large_gradient[-B:] * k, small_gradient)
    torch.testing.assert_close(large_gradient[:B], large_gradient[-B:], rtol=0, atol=0)
