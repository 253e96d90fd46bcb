# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, the range of numbers: rows whose squares overflow give the right result or one
that is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from cases import SHORT, Case, assert_within_budget, each_case, is_float
from torch import Tensor

from kdkernels._similarity import NORM_EPS, unit
from kdkernels.testing import numerics

# Largest elements of rows. The square of the first just fits fp32, or just does not; the last is
# near the end of its range.
LARGEST = (1e19, 3e19, 1e25, 1e38)
# Where one row among others of size 1 says nothing: which of them, and why.
FAR_ROWS_ARE_LOST = {
    "rkd_angle": "the angle at a row loses the digits of the ratio of the distances there",
    "triplet_loss_all": "distances to a far row are equal, and rounding decides which losses count",
    "pkt": "rows are centred, and a far row moves the centre",
}


def _enlarged(x: Tensor, largest: float, rows: slice) -> Tensor:
    """Some rows times a power of two, which rounds nothing."""
    x, part = x.clone(), x[..., rows, :]
    x[..., rows, :] = part * 2.0 ** math.floor(math.log2(largest / part.abs().max().item()))
    return x


def _large(case: Case) -> list[Case]:
    """The case with one row or all rows large, of each matrix and of all of them."""
    places = [i for i, arg in enumerate(case.sample.args) if is_float(arg) and arg.dim() > 1]
    parts = {"all rows": (slice(None), LARGEST)}
    if case.info.name not in FAR_ROWS_ARE_LOST:
        parts["one row"] = (slice(0, 1), LARGEST[::3])
    found = []
    for which in [[place] for place in places] + ([places] if len(places) > 1 else []):
        for part, (rows, sizes) in parts.items():
            for largest in sizes:
                args = list(case.sample.args)
                for place in which:
                    args[place] = _enlarged(args[place], largest, rows)
                found.append(case.having(*args, name=f"{part} of {which} {largest:g}"))
    return found


def _definition(case: Case, dtype: torch.dtype) -> Tensor:
    return case.info.define(case.sample, numerics.cast(case.sample.args, dtype)).double()


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@each_case()
def test_large_rows_give_the_right_result_or_none(case: Case) -> None:
    """The definition in fp32 keeps half of its digits, where an overflow would leave none. A kernel
    is held to the budget: with the definition's error on the rows as they were or as they are, or
    with what the rounding of the rows makes of the result, as where a far row's distances to all
    others are equal."""
    plain = _definition(case, torch.float64)
    size, eps = plain.abs().max().item(), torch.finfo(case.dtype).eps
    rounding = _difference(_definition(case, case.dtype), plain) / size if size > 0 else 0.0
    for large in _large(case):
        hi, low = (_definition(large, dtype) for dtype in (torch.float64, case.dtype))
        out = large.call(*large.sample.args)
        for result in (out, low):
            assert not (result.isfinite() & ~hi.isfinite()).any(), large.id
        moved = _difference(
            *(x.nan_to_num() for x in (_definition(_moved(large), torch.float64), hi))
        )
        hi = torch.where(hi.isfinite(), hi, 0.0)
        out, low = (torch.where(x.isfinite(), x, hi) for x in (out, low))
        scale = max(size, hi.abs().max().item(), _size_of_terms(case))
        error = _difference(low, hi)
        assert error <= math.sqrt(eps) * scale + moved, large.id
        low = hi + max(error, rounding * scale, moved)
        assert_within_budget(large, [numerics.compare("loss", out, hi, low, case.dtype, scale)])


def _size_of_terms(case: Case) -> float:
    """Of the numbers whose difference the loss is."""
    magnitude = case.info.magnitude if case.info.subtracts else None
    return (magnitude(case.sample)[0] or 0.0) if magnitude is not None else 0.0


def _moved(case: Case) -> Case:
    """Rows in fp64 off by what the dtype of the case rounds."""
    eps = torch.finfo(case.dtype).eps
    return case.having(
        *(
            arg.double() * (1 + eps * (torch.rand(arg.shape, dtype=torch.float64) - 0.5))
            if is_float(arg)
            else arg
            for arg in case.sample.args
        )
    )


@pytest.mark.parametrize("dtype", SHORT, ids=SHORT.values())
def test_rows_over_their_norms(dtype: torch.dtype) -> None:
    """Right, or NaN: a row of zeros would be a finite wrong result."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = torch.tensor([[3.0, 4.0, 0.0]]).to(dtype)
    wanted = x / 5
    for exponent in range(int(math.log2(smallest)), int(math.log2(largest)) - 2):
        u = unit(x * 2.0**exponent)
        norm = 5 * 2.0**exponent
        expected = wanted * min(norm / NORM_EPS, 1.0)
        right = (u - expected).abs() <= 2 * torch.finfo(dtype).eps * expected
        assert (right | u.isnan()).all(), exponent
        if 1 <= norm < math.sqrt(largest) / 2:
            assert right.all()
