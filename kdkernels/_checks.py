# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the public functions.

Each message names the argument, what was expected and what was given.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
)  # fmt: skip


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower; also the dtype of a loss."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(name: str, x: Any) -> None:
    """A tensor whose numbers lie at strides: not a sparse nor a nested one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")


def features(name: str, x: Any, min_dim: int = 2) -> None:
    """A real floating-point tensor with at least `min_dim` dimensions."""
    tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
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


def common_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds the numbers of all, so that no tensor is rounded.

    bf16 beside fp32 gives fp32, and so does bf16 beside fp16; fp64 beside anything gives fp64.
    """
    common = dtypes[0]
    for dtype in dtypes[1:]:
        if dtype != common:
            common = torch.promote_types(common, dtype)
    return common


def same_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in their common dtype; gradients come back in the dtype of each."""
    return in_dtype(common_dtype(x.dtype, y.dtype), x, y)


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
    if not torch._C._are_functorch_transforms_active():
        return False
    inner = torch.func.debug_unwrap(x, recurse=False)  # a batched tensor hides what it asks for
    return inner is not x and wants_gradient(inner)


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if isinstance(value, str) and value in allowed:
        return
    expected = f"{name} must be one of {', '.join(map(repr, allowed))}"
    if not isinstance(value, str):
        raise TypeError(f"{expected}, got {type(value).__name__}")
    raise ValueError(f"{expected}, got {value!r}")


def number(name: str, value: Any) -> float:
    """A float, from a number of Python or NumPy or a tensor without dimensions.

    The value of a tensor is taken as a constant, so one that asks for a gradient is refused.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor):
        _constant(name, value)
        if value.dtype != torch.bool and not value.is_complex():
            return float(value)
        raise TypeError(f"{name} must be a number, got a tensor of {value.dtype}")
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if _is_numpy_scalar(value) and value.dtype.kind in "iuf":  # an array without dimensions
        return float(value)
    raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def whole(name: str, value: Any) -> int:
    """An int, from whatever stands for one as an index; no bool."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        _constant(name, value)
        if value.dtype != torch.bool and not value.is_floating_point() and not value.is_complex():
            return int(value)
        raise TypeError(f"{name} must be an integer, got a tensor of {value.dtype}")
    if not isinstance(value, bool) and not (_is_numpy_scalar(value) and value.dtype.kind == "b"):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def _constant(name: str, value: Tensor) -> None:
    """A tensor whose value may be taken as that of an option."""
    tensor(name, value)
    if value.dim() != 0:
        raise ValueError(
            f"{name} must be a number or a tensor without dimensions, got shape {list(value.shape)}"
        )
    if value.requires_grad:
        raise ValueError(
            f"{name} must be a constant, since no gradient comes back to it, got a tensor that "
            "requires one; give its value, e.g. .item()"
        )


def _is_numpy_scalar(value: Any) -> bool:
    """Of NumPy, which is not imported for it: a scalar, or an array without dimensions."""
    return hasattr(value, "__array__") and getattr(value, "shape", None) == ()


def positive(name: str, value: Any) -> float:
    found = number(name, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return found


def count(name: str, value: Any, low: int, high: int) -> int:
    found = whole(name, value)
    if not low <= found <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {found}")
    return found


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def not_negative(name: str, value: Any) -> float:
    found = number(name, value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{name} must be a finite number that is not negative, got {value}")
    return found


def integer(name: str, x: Any) -> None:
    """A tensor of integers that int64 holds."""
    tensor(name, x)
    if x.dtype not in INTEGERS:
        why = ", whose numbers int64 may not hold" if x.dtype == torch.uint64 else ""
        raise TypeError(f"{name} must be an integer tensor, got {x.dtype}{why}")


def labels(name: str, y: Any, of_name: str, of: Tensor) -> None:
    """One integer per row of another tensor, on its device."""
    integer(name, y)
    if y.shape != of.shape[:1]:
        raise ValueError(
            f"{name} must have shape {list(of.shape[:1])} like the rows of {of_name}, "
            f"got {list(y.shape)}"
        )
    same_device(name, y, of_name, of)


def sample_mask(mask: Any, of_name: str, of: Tensor, name: str = "sample_mask") -> None:
    """None, or one bool per row of another tensor [..., B, D], on its device."""
    if mask is None:
        return
    tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, got {mask.dtype}")
    same_device(name, mask, of_name, of)
    if mask.shape != of.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {list(of.shape[:-1])} like the rows of {of_name}, "
            f"got {list(mask.shape)}"
        )


def ignore_index(value: Any) -> int | None:
    """None, or any int64."""
    return None if value is None else count("ignore_index", value, -(2**63), 2**63 - 1)
