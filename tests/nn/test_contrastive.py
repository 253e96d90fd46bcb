# SPDX-License-Identifier: Apache-2.0
"""ContrastiveLoss: values and gradients of the formula, options, state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from modules import assert_same_loss, pair_loss
from torch import Tensor

import kdkernels as kd

CONTRASTIVE = kd.nn.ContrastiveLoss


def rows(B: int = 12, D: int = 4) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64, requires_grad=True)


def labels(B: int = 12) -> Tensor:
    return torch.arange(B) % 3


def test_default_is_the_published_sum_over_the_number_of_pairs() -> None:
    x, y = rows(), labels()
    unit = x / x.norm(dim=1, keepdim=True)
    losses = torch.stack([
        pair_loss(unit[i], unit[j], bool(y[i] == y[j]), 1.0) for i in range(12) for j in range(i)
    ])  # fmt: skip
    assert_same_loss(CONTRASTIVE()(x, y), losses.mean(), x)
    assert losses.eq(0).any()
    nonzero = losses.sum() / (losses > 0).sum()
    assert_same_loss(CONTRASTIVE(reduction="mean_nonzero")(x, y), nonzero, x)


def test_options_are_those_of_the_function() -> None:
    x, y, r, r_y = rows(), labels(), rows(7), labels(7)
    options: dict[str, Any] = {
        "margin": 2.0, "distance": "sqeuclidean", "normalize_embeddings": False, "reduction": "sum",
    }  # fmt: skip
    loss = CONTRASTIVE(3, **options, backend="reference")(x, y, r, r_y)
    expected = kd.contrastive_loss(x, y, references=r, reference_labels=r_y, **options)
    assert_same_loss(loss, 3 * expected, x, r)


@pytest.mark.parametrize("B", [0, 1])
def test_batches_with_no_pair(B: int) -> None:
    x, y = rows(B), labels(B)
    loss = CONTRASTIVE()(x, y)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_wide(dtype: torch.dtype) -> None:
    x = rows().detach().to(dtype).requires_grad_()
    loss = CONTRASTIVE()(x, labels())
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_compiles_into_one_graph() -> None:
    x, y = rows(), labels()
    module = CONTRASTIVE()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_loss(compiled(x, y), module(x, y), x)


def test_names_its_options_and_has_no_state() -> None:
    assert repr(CONTRASTIVE(2)) == (
        "ContrastiveLoss(weight=2, margin=1, distance='euclidean', normalize_embeddings=True, "
        "ignore_index=None, reduction='mean', backend='auto')"
    )
    assert CONTRASTIVE().state_dict() == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"margin": -0.1}, ValueError, "margin must be a finite number that is not negative"),
        ({"margin": "1"}, TypeError, "margin must be a number, got str"),
        ({"weight": math.inf}, ValueError, "weight must be a finite number"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CONTRASTIVE(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distance": "l1"}, ValueError, "distance must be one of 'euclidean', "),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'mean_nonzero', "),
        ({"normalize_embeddings": 0}, TypeError, "normalize_embeddings must be True or False"),
    ],
)
def test_bad_options_of_contrastive(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CONTRASTIVE(**options)


def test_bad_inputs() -> None:
    x, y = rows(), labels()
    with pytest.raises(ValueError, match="reference_labels must be given"):
        CONTRASTIVE()(x, y, x)
