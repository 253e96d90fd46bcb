# SPDX-License-Identifier: Apache-2.0
"""Rows that lie together far from 0 cost what other rows cost: products give their distances, less
a common point, and no tile is made again from differences."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd

CPU = torch.device("cpu")
B, D = 40, 20
LABELS = torch.arange(B) % 9


def _mirrored(x: Tensor) -> Tensor:
    """Rows around the same mean, none of which is one of x."""
    return (2 * x.detach().double().mean(0) - x.detach().double()).to(x.dtype)


CALLS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "contrastive": lambda x, backend: kd.contrastive_loss(
        x, LABELS, normalize_embeddings=False, margin=20.0, backend=backend
    ),
    "triplet": lambda x, backend: kd.triplet_loss(
        x, LABELS, normalize_embeddings=False, mining="batch_hard", backend=backend
    ),
    "triplet-references": lambda x, backend: kd.triplet_loss(
        x, LABELS, references=_mirrored(x), reference_labels=LABELS,
        normalize_embeddings=False, mining="batch_semihard", backend=backend,
    ),
    "triplet_all": lambda x, backend: kd.triplet_loss(
        x, LABELS, normalize_embeddings=False, mining="batch_all", backend=backend
    ),
    "pairwise": lambda x, backend: kd.pairwise(x, metric="euclidean", backend=backend).sum(),
    "pairwise-groups": lambda x, backend: kd.pairwise(
        torch.stack((x, 2 * x)), torch.stack((_mirrored(x), 2 * _mirrored(x))), metric="rbf",
        gamma=0.01, backend=backend,
    ).sum(),
    "pkt": lambda x, backend: kd.pkt(x, x.detach() * 1.1, kernel="student_t", backend=backend),
    "rkd": lambda x, backend: kd.rkd_distance(x, x.detach()[:, ::2], backend=backend),
}  # fmt: skip


def _collapsed(dtype: torch.dtype) -> Tensor:
    """Rows whose cosines are about 0.99; in fp32, 0.9999."""
    noise = torch.randn(B, D, dtype=torch.float64)
    centre = (torch.rand(D, dtype=torch.float64) + 0.5) * torch.sign(torch.randn(D).double())
    return (centre + noise * (0.01 if dtype == torch.float32 else 0.1)).to(dtype)


def _run(call: Callable[[Tensor, str], Tensor], x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = call(x, backend)
    return value.detach(), *torch.autograd.grad(value, x)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter here")
def test_triton_makes_no_tile_again(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of 0 lets none be made again, and changes no bit."""
    pytest.importorskip("triton")
    x = _collapsed(dtype)
    before = _run(CALLS[name], x, "triton")
    for module in ("common.distances", "pairwise.kernels", "pkt.kernels", "triplet.kernels"):
        monkeypatch.setattr(f"kdkernels.triton.{module}.close_share", lambda x_ptr, D: 0.0)
    after = _run(CALLS[name], x, "triton")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture
def take_differences() -> Callable[[], int]:
    path = os.environ.get("KDKERNELS_CUDA_HOST")
    if path is None:
        pytest.skip("the CUDA kernels do not run on the host here")
    take = ctypes.CDLL(path).kdk_take_differences
    take.restype = ctypes.c_int64
    return take


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CALLS if name[:3] in ("tri", "pai")])
def test_cuda_makes_no_pair_again(
    name: str, dtype: torch.dtype, take_differences: Callable[[], int]
) -> None:
    x = _collapsed(dtype)
    take_differences()
    CALLS[name](x, "cuda")
    assert take_differences() == 0
    if "-" not in name:  # in batch
        x[::2] = x[:1]  # duplicates, which products lose wherever they lie
        CALLS[name](x, "cuda")
        assert take_differences() > 0


def _centred(x: Tensor, r: Tensor | None = None) -> Any:
    return pytest.importorskip("kdkernels.triton.common.centre").centred(x, r)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter here")
def test_what_a_point_does_to_rows() -> None:
    x = torch.randn(300, 37)
    x[:, 1] = 0.1  # equal numbers become 0
    x[:, 2] += 1000.0
    x[:, 3] = torch.arange(300) % 5 + 100.0  # whole numbers stay whole
    x[7, 4], x[8, 5], x[9] = torch.inf, torch.nan, 1e18
    rows, same = _centred(x)
    assert rows is same
    assert rows.given is x
    keep = torch.ones(300, dtype=torch.bool)
    keep[[7, 8, 9]] = False
    moved, given = rows.x[keep], x[keep]
    assert torch.equal(moved[:, 0], given[:, 0])  # columns around 0 are not moved
    assert moved[:, 1].eq(0).all()
    assert moved[:, 2].abs().max() < 10
    assert torch.equal(moved[:, 3], moved[:, 3].round())
    expected = moved.double().square().sum(1).float()
    assert torch.equal(rows.norm[keep], expected)
    assert torch.isinf(rows.norm[[7, 8]]).all()
    assert torch.equal(rows.x[9, 0], x[9, 0])
    assert torch.equal(rows.norm[9], x[9].double().square().sum().float())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter here")
def test_groups_have_points_of_their_own_and_strides_do_not_matter() -> None:
    x = torch.randn(2, 50, 20) + torch.tensor([10.0, -30.0])[:, None, None]
    r = torch.randn(2, 20, 33).mT + 5.0
    rows, others = _centred(x, r)
    for g in range(2):
        one, other = _centred(x[g], r[g])
        assert torch.equal(rows.x[g], one.x)
        assert torch.equal(rows.norm[g], one.norm)
        assert torch.equal(others.x[g], other.x)
        assert torch.equal(others.norm[g], other.norm)
        assert others.x[g].abs().mean() < 1.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter here")
def test_rows_of_16_bits_are_not_moved() -> None:
    x = (torch.randn(5, 20) + 3).bfloat16()
    rows, _ = _centred(x)
    assert rows.x is rows.given is x
    assert torch.equal(rows.norm, x.double().square().sum(1).float())
