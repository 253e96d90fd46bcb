# SPDX-License-Identifier: Apache-2.0
"""Cases and data that the tests of the losses over labelled embeddings share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEVICES, Case, interpreted
from torch import Tensor
from values import STUDENT

from kdkernels import _dispatch
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos, randn, rng

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
    """Parametrise a test by `case`: a loss with its options, on STUDENT and LABELS."""
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
    return Sample("waves", (STUDENT.to(device, dtype), LABELS.to(device)), options)


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
