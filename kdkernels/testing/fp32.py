# SPDX-License-Identifier: Apache-2.0
"""How fp32 products of a GPU are computed, set for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch


@contextlib.contextmanager
def fp32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Set torch's precision of fp32 matrix products on CUDA devices, and put back what it was."""
    matmul = torch.backends.cuda.matmul
    outer = matmul.fp32_precision
    matmul.fp32_precision = "none"
    inherited = matmul.fp32_precision == outer
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = "none" if inherited else outer
