# SPDX-License-Identifier: Apache-2.0
"""What people pass in the place of a tensor or of a word, and no function takes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS: dict[str, Any] = {
    "another word": "other",
    "None": None,
    "number": 3,
    "list": ["auto"],
    "array": np.array(["auto", "mean"]),
    "array of one": np.array("auto"),
    "tensor": torch.ones(2),
}


def in_place_of(x: Tensor) -> dict[str, Any]:
    """By what is wrong."""
    found: dict[str, Any] = {
        "list": x.tolist(),
        "array": x.float().numpy(),
        "complex": x.to(torch.complex64),
        "fp8": x.float().to(torch.float8_e5m2),
        "quantized": torch.quantize_per_tensor(x.float(), 1.0, 0, torch.quint8),
    }
    if x.dim() > 0:
        found["sparse"] = x.to_sparse()
        found["nested"] = torch.nested.nested_tensor([x, x])
        found["jagged"] = torch.nested.nested_tensor([torch.atleast_2d(x)] * 2, layout=torch.jagged)
    if x.dim() == 2:
        found["csr"] = x.to_sparse_csr()
    if x.is_floating_point():
        return found | {"integer": x.long(), "bool": x > 0}
    if x.dtype == torch.bool:
        return found | {"integer": x.long(), "float": x.float()}
    return found | {"float": x.float(), "bool": x > 0, "uint64": x.abs().to(torch.uint64)}


def annotated(function: Any, *hints: str) -> list[str]:
    """Parameters whose annotation begins like one of these."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if str(parameter.annotation).startswith(hints)
    ]
