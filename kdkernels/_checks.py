# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the public functions.

Each message names the argument, what was expected and what was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower; also the dtype of a loss."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def features(name: str, x: Any, min_dim: int = 2) -> None:
    """A real floating-point tensor with at least `min_dim` dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.dim() < min_dim:
        raise ValueError(
            f"{name} must have at least {min_dim} dimensions, got shape {list(x.shape)}"
        )


def matrix(name: str, x: Any) -> None:
    """Features of exactly two dimensions."""
    features(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {list(x.shape)}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")


def same_groups(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """All dimensions but the last two agree."""
    if x.dim() != other.dim():
        raise ValueError(
            f"{name} must have {other.dim()} dimensions like {other_name}, "
            f"got {x.dim()}: shape {list(x.shape)}"
        )
    if x.shape[:-2] != other.shape[:-2]:
        raise ValueError(
            f"{name} must have the leading dimensions {list(other.shape[:-2])} like {other_name}, "
            f"got {list(x.shape[:-2])}"
        )


def same_leading(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """All dimensions but the last agree."""
    same_groups(name, x, other_name, other)
    if x.shape[-2] != other.shape[-2]:
        raise ValueError(
            f"{name} must have {other.shape[-2]} rows like {other_name}, got {x.shape[-2]}"
        )


def same_columns(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} must have {other.shape[-1]} columns like {other_name}, got {x.shape[-1]}"
        )


def common_dtype(name: str, x: Tensor, other_name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor and of another one; under autocast, where they differ, the wider."""
    if x.dtype == dtype:
        return dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.promote_types(x.dtype, dtype)
    raise TypeError(f"{name} must be {dtype} like {other_name}, got {x.dtype}")


def same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in their common dtype."""
    return in_dtype(common_dtype(name, x, other_name, other.dtype), x, other)


def in_dtype(dtype: torch.dtype, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors in a dtype; those that have it stay the same objects."""
    if x.dtype == y.dtype == dtype:
        return x, y
    return x.to(dtype), y.to(dtype)


def wants_gradient(x: Tensor | None) -> bool:
    if x is None or not torch.is_grad_enabled():
        return False
    if x.requires_grad or torch.compiler.is_compiling():
        return x.requires_grad
    inner = torch.func.debug_unwrap(x, recurse=False)  # a batched tensor hides what it asks for
    return inner is not x and wants_gradient(inner)


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return float(value)


def count(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def not_negative(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number that is not negative, got {value}")
    return float(value)


def integer(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {x.dtype}")


def labels(name: str, y: Any, of_name: str, of: Tensor) -> None:
    """One integer per row of another tensor, on its device."""
    integer(name, y)
    if y.shape != of.shape[:1]:
        raise ValueError(
            f"{name} must have shape {list(of.shape[:1])} like the rows of {of_name}, "
            f"got {list(y.shape)}"
        )
    same_device(name, y, of_name, of)


def sample_mask(mask: Any, of_name: str, of: Tensor) -> None:
    """One bool per row of another tensor, on its device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"sample_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"sample_mask must be torch.bool, got {mask.dtype}")
    same_device("sample_mask", mask, of_name, of)
    if mask.shape != of.shape[:1]:
        raise ValueError(
            f"sample_mask must have shape {list(of.shape[:1])} like the rows of {of_name}, "
            f"got {list(mask.shape)}"
        )
