# SPDX-License-Identifier: Apache-2.0
"""What is special to sampled_similarity: both ways of the CPU kernel, rows that are not named,
indices that name none, extra memory, banks in another dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdkernels as kd
from kdkernels.ops.noise_contrastive import move_rows, noise_contrastive
from kdkernels.reference import _sampled_similarity as reference
from kdkernels.testing import numerics, peak
from kdkernels.testing.opinfo import opinfos

MANY, FEW = 16, 400  # rows of a bank of which 24 indices are, or are not, a large part
CPU_BACKENDS = ("reference", "cpu")


def draw(B: int, D: int, N: int, K: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return torch.randn(B, D, dtype=dtype), torch.randn(N, D, dtype=dtype), torch.randint(N, (B, K))


def result(backend: str, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, and the gradient of x."""
    value, (gradient,) = numerics.value_and_grads(
        lambda *a: kd.sampled_similarity(*a, backend=backend), args, 1
    )
    return value, gradient


def _similarity(x: Tensor, bank: Tensor, rows: Tensor, backend: str) -> None:
    kd.sampled_similarity(x, bank, rows, backend=backend).sum().backward()


def _similarity_under_autocast(x: Tensor, bank: Tensor, rows: Tensor, backend: str) -> None:
    wide = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kd.sampled_similarity(wide, bank, rows, backend=backend).sum().backward()


def _loss_of_noise(x: Tensor, bank: Tensor, rows: Tensor, backend: str) -> None:
    noise_contrastive(x, bank, rows, torch.tensor(0.0), backend=backend).loss.backward()


def _average(x: Tensor, bank: Tensor, rows: Tensor, backend: str) -> None:
    move_rows(bank, rows[:, 0], x, 0.5)


READERS = (_similarity, _similarity_under_autocast, _loss_of_noise, _average)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__[1:])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bank_is_read_where_it_is_named_and_nowhere_else(
    dtype: torch.dtype, backend: str, read: Callable[[Tensor, Tensor, Tensor, str], None]
) -> None:
    """No copy of a bank, in another dtype or layout, is in memory at any time."""
    B, D, N, K = 3, 32, 50_000, 7
    x, bank, rows = torch.randn(B, D), torch.randn(N, 2 * D), torch.randint(N, (B, K))
    x, bank = x.to(dtype).requires_grad_(), bank.to(dtype)[:, :D]
    with torch.profiler.profile(profile_memory=True) as profile:
        read(x, bank, rows, backend)
    used = max(abs(event.cpu_memory_usage) for event in profile.events())
    assert 0 < used < bank.numel() * bank.itemsize / 50


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "triton"])
@pytest.mark.parametrize("N", [MANY, FEW])
def test_under_autocast_the_wider_dtype_counts_and_the_bank_stays(backend: str, N: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    x, bank, indices = draw(18, 21, N, 24, torch.float32)
    narrow = bank.bfloat16()
    expected = result(backend, x, narrow.float(), indices)
    with torch.autocast("cpu", torch.bfloat16):
        got = result(backend, x, narrow, indices)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        scores, dx = result(backend, x.bfloat16(), bank, indices)
    assert (scores.dtype, dx.dtype) == (torch.float32, torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(
    B=st.sampled_from([1, 5, 16, 21]),
    D=st.integers(0, 70),
    N=st.integers(1, 300),
    K=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape_agrees_with_the_definition(
    B: int, D: int, N: int, K: int, dtype: torch.dtype
) -> None:
    args = draw(B, D, N, K, dtype)
    hi, (d_hi,) = numerics.value_and_grads(
        reference.sampled_similarity, numerics.cast(args, torch.float64), 1
    )
    low, (d_low,) = numerics.value_and_grads(reference.sampled_similarity, args, 1)
    value, gradient = result("cpu", *args)
    for of in (
        numerics.compare("scores", value, hi, low, dtype),
        numerics.compare("dx", gradient, d_hi, d_low, dtype),
    ):
        assert of.ok, of.detail


@pytest.mark.parametrize("N", [MANY, FEW])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_counts_only_for_those_that_name_it(N: int, bad: float) -> None:
    """Where all products are made, 0 times it must not."""
    x, bank, indices = draw(18, 5, N, 24)
    indices = indices.where(indices != 3, 4)
    indices[7, 11] = 3
    expected = [result(backend, x, bank, indices) for backend in CPU_BACKENDS]
    bank[3] = bad
    for backend, (scores, dx) in zip(CPU_BACKENDS, expected, strict=True):
        got, gradient = result(backend, x, bank, indices)
        finite = torch.ones_like(scores, dtype=torch.bool)
        finite[7, 11] = False
        assert torch.equal(torch.isfinite(got), finite)
        assert not torch.isfinite(gradient[7]).any()
        others = torch.arange(18) != 7
        torch.testing.assert_close(got[finite], scores[finite])
        torch.testing.assert_close(gradient[others], dx[others])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_index_that_names_no_row_gives_nan(backend: str) -> None:
    """Where values of indices are not looked at, which is the case on a device."""
    if backend == "triton":
        pytest.importorskip("triton")
    x, bank, indices = draw(4, 6, 9, 3, torch.float32)
    good = kd.sampled_similarity(x, bank, indices, backend=backend)
    indices[1, 2], indices[3, 0] = 9, -1
    operators = torch.ops.kdkernels
    scores = operators.sampled_similarity_fwd(x, bank, indices, backend)
    wrong = torch.zeros(4, 3, dtype=torch.bool)
    wrong[1, 2] = wrong[3, 0] = True
    assert torch.equal(scores.isnan(), wrong)
    assert torch.equal(scores[~wrong], good[~wrong])
    dx = operators.sampled_similarity_bwd(torch.ones(4, 3), x, bank, indices, backend)
    assert torch.equal(dx.isnan().all(1), wrong.any(1))
    assert torch.equal(dx.isnan().any(1), wrong.any(1))


def test_the_bank_must_stay_until_the_backward() -> None:
    x, bank, indices = draw(4, 6, 9, 3)
    scores = kd.sampled_similarity(x.requires_grad_(), bank, indices)
    bank.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_a_bank_with_a_gradient_is_taken_where_none_is_recorded() -> None:
    x, bank, indices = draw(4, 6, 9, 3)
    expected = kd.sampled_similarity(x, bank, indices)
    with torch.no_grad():
        assert torch.equal(kd.sampled_similarity(x, bank.requires_grad_(), indices), expected)


def test_memory_is_far_below_that_of_the_gathered_rows() -> None:
    (info,) = (info for info in opinfos() if info.name == "sampled_similarity")
    (found,) = (found for found in info.bench if found.name == "crd")
    B, D, K = (found.sizes[name] for name in "BDK")
    device, mode = torch.device("cpu"), "fwd_bwd"
    used = peak.extra_mib(info.name, found, torch.float32, mode, "cpu", device)
    scores = 2 * B * K * 4 / peak.MIB  # and their gradient
    assert used < scores + 32
    assert 2 * scores < B * K * D * 4 / peak.MIB
