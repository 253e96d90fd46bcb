# SPDX-License-Identifier: Apache-2.0
"""Kernels multiply fp32 features as torch does, whichever of its switches was used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Case, each_case, few, gradients, leaves

from kdkernels import _gpu
from kdkernels.testing.fp32 import fp32_products

BACKENDS = torch.backends


@pytest.fixture(autouse=True)
def _as_after_import() -> Iterator[None]:
    """Every switch as torch has it after its import, here and for the tests that follow."""
    _reset()
    yield
    _reset()


def _reset() -> None:
    torch.set_float32_matmul_precision("highest")
    for switch in (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.cudnn, BACKENDS):
        switch.fp32_precision = "none"


def _new(switch: Any, precision: str) -> Callable[[], None]:
    return partial(setattr, switch, "fp32_precision", precision)


MATMUL = partial(_new, BACKENDS.cuda.matmul)
CUDNN, EVERYWHERE = partial(_new, BACKENDS.cudnn), partial(_new, BACKENDS)
OLD = partial(partial, torch.set_float32_matmul_precision)

# What a program sets, in order, and how cuBLAS then multiplies: by the setting of products on CUDA,
# else by that of the CUDA backend, which is cudnn's, else by that of all backends. The older
# setters write the first of these.
MIXES = {
    "nothing": ((), "highest"),
    "matmul-tf32": ((MATMUL("tf32"),), "high"),
    "matmul-ieee": ((MATMUL("ieee"),), "highest"),
    "everywhere-tf32": ((EVERYWHERE("tf32"),), "high"),
    "everywhere-bf16": ((EVERYWHERE("bf16"),), "highest"),  # which CUDA has not
    "cudnn-tf32": ((CUDNN("tf32"),), "high"),
    "cudnn-ieee": ((CUDNN("ieee"),), "highest"),
    "old-highest": ((OLD("highest"),), "highest"),
    "old-high": ((OLD("high"),), "high"),
    "old-medium": ((OLD("medium"),), "high"),
    "older": ((partial(setattr, BACKENDS.cuda.matmul, "allow_tf32", True),), "high"),
    "everywhere-tf32-matmul-ieee": ((EVERYWHERE("tf32"), MATMUL("ieee")), "highest"),
    "everywhere-tf32-cudnn-ieee": ((EVERYWHERE("tf32"), CUDNN("ieee")), "highest"),
    "old-high-matmul-ieee": ((OLD("high"), MATMUL("ieee")), "highest"),
    "old-highest-everywhere-tf32": ((OLD("highest"), EVERYWHERE("tf32")), "highest"),
    "matmul-tf32-old-highest": ((MATMUL("tf32"), OLD("highest")), "highest"),
}


@pytest.mark.parametrize(("switches", "wanted"), MIXES.values(), ids=MIXES)
def test_setting_is_that_of_torchs_products(
    switches: tuple[Callable[[], None], ...], wanted: str
) -> None:
    for switch in switches:
        switch()
    assert _gpu.fp32_matmul() == wanted
    before = BACKENDS.cuda.matmul.fp32_precision
    for precision, inside in {"tf32": "high", "ieee": "highest"}.items():
        with fp32_products(precision):
            assert _gpu.fp32_matmul() == inside
        assert BACKENDS.cuda.matmul.fp32_precision == before


def test_an_inherited_setting_is_inherited_again() -> None:
    with fp32_products("tf32"):
        pass
    EVERYWHERE("tf32")()
    assert _gpu.fp32_matmul() == "high"


def test_a_torch_without_the_newer_switches() -> None:
    OLD("medium")()
    with mock.patch.object(BACKENDS.cuda, "matmul", object()):
        assert _gpu.fp32_matmul() == "medium"


@each_case(
    lambda found: few(found)[:1],
    dtypes=(torch.float32, torch.bfloat16),
    backends=("triton", "cuda"),
    interpret_all=True,
)
def test_kernels_follow_old_and_new_switches_alike(case: Case) -> None:
    """With cudnn's the older getter of torch raises, whatever the dtype of the features."""

    def run(switch: Callable[[], None]) -> list[torch.Tensor]:
        _reset()
        switch()
        args = leaves(case)
        value = case.call(*args)
        return [value.detach(), *gradients(value, args)]

    old, new = run(OLD("high")), run(CUDNN("tf32"))
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
