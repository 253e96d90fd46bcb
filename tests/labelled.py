# SPDX-License-Identifier: Apache-2.0
"""Cases and data that the tests of the losses over labelled embeddings share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICES, Case, interpreted
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.testing import numerics
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos, randn, rng

# Agreement of two ways to the same fp64 number: both keep FP64_RELATIVE of it.
FP64 = {"rtol": 2 * numerics.FP64_RELATIVE, "atol": 0.0}


def waves(B: int, D: int, a: float, b: float, c: float) -> Tensor:
    """A matrix that can be written down: sin(a i + b d + c) + 0.3 cos(0.05 i d + c)."""
    i, d = torch.arange(B, dtype=torch.float64)[:, None], torch.arange(D, dtype=torch.float64)
    return torch.sin(a * i + b * d + c) + 0.3 * torch.cos(0.05 * i * d + c)


WAVES = waves(8, 16, 0.9, 0.31, 0.5)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 0, 3])


def info_of(name: str) -> OpInfo:
    (info,) = (info for info in opinfos() if info.name == name)
    return info


# Every meaning of every loss over labelled embeddings.
LOSSES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("triplet_loss", {"mining": "batch_hard"}),
    ("triplet_loss", {"mining": "batch_semihard"}),
    ("triplet_loss_all", {"mining": "batch_all"}),
    ("triplet_loss_all", {"mining": "pair_semihard"}),
    ("contrastive_loss", {}),
)


SEMIHARD = ({"mining": "batch_semihard"}, {"mining": "pair_semihard"})


def each_backend(
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    backends: Any = _dispatch.BACKENDS,
    losses: tuple[tuple[str, dict[str, Any]], ...] = LOSSES,
) -> pytest.MarkDecorator:
    """Parametrise a test by `case`: a loss with its options, on WAVES."""
    params = [
        pytest.param(
            Case(info_of(name), backend, device, dtype, _waves(device, dtype, options)),
            id="-".join((name, *options.values(), backend, device.type, str(dtype)[6:])),
            marks=[pytest.mark.gpu] if device.type == "cuda" else [],
        )
        for name, options in losses
        for backend in backends
        for device in DEVICES
        for dtype in dtypes
        # one way of mining per loss where both would take minutes; the generic tests have all
        if not (losses is LOSSES and interpreted(backend, device) and options in SEMIHARD)
    ]
    return pytest.mark.parametrize("case", params)


def _waves(device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> Sample:
    return Sample("waves", (WAVES.to(device, dtype), LABELS.to(device)), options)


def whole(case: Case, B: int, D: int, classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Small whole numbers: raw distances are exact in every dtype, with many ties among them."""
    x = torch.randint(-3, 4, (B, D), generator=rng(seed)).to(case.device, case.dtype)
    return x, torch.randint(classes, (B,), generator=rng(seed + 100)).to(case.device)


def normal(case: Case, B: int, D: int, classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    labels = torch.randint(classes, (B,), generator=rng(seed + 100)).to(case.device)
    return randn(B, D, seed=seed, device=case.device, dtype=case.dtype), labels


def with_references(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"references": x, "reference_labels": y}


def gradient_of(case: Case, x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = case.call(x, y, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def on(case: Case, name: str, x: Tensor, y: Tensor, **options: Any) -> Case:
    """The same loss on other rows."""
    kwargs = case.sample.kwargs | options
    return Case(case.info, case.backend, case.device, case.dtype, Sample(name, (x, y), kwargs))


def assert_same_number(out: Tensor, wanted: Tensor) -> None:
    """Of fp64 tensors, relative to their largest element."""
    size = wanted.detach().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    torch.testing.assert_close(out / size, wanted / size, rtol=0, atol=FP64["rtol"])
