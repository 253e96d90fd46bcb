# SPDX-License-Identifier: Apache-2.0
"""Distances between rows, tile by tile, and what weights on them give the gradient of the rows.

Features are contiguous. Everything accumulates in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.common.product import product_tile

EUCLIDEAN = tl.constexpr(0)
SQEUCLIDEAN = tl.constexpr(1)
COSINE = tl.constexpr(2)

DISTANCES = {
    "euclidean": EUCLIDEAN.value,
    "sqeuclidean": SQEUCLIDEAN.value,
    "cosine": COSINE.value,
}


LARGEST = tl.constexpr(3.4028234663852886e38)  # fp32
# A row is finite if its squared norm is below this: then no distance between two such overflows.
FINITE = tl.constexpr(LARGEST.value / 4)


@triton.jit
def close_share(x_ptr, D):
    """Squared distances below this share of |x|^2 + |r|^2 are computed again from differences;
    docs/numerics.md derives it."""
    if x_ptr.dtype.element_ty == tl.float32:
        return 0.0625
    elif x_ptr.dtype.element_ty == tl.bfloat16:
        return tl.minimum((2.0 + 0.25 * D) * (1 / 65536), 0.0625)
    else:
        return tl.minimum((2.0 + 0.25 * D) * (1 / 8192), 0.0625)


@triton.jit
def unmoved(x_ptr, given_ptr):
    """Where the rows lie as they were given: rows of 16 bits are not moved, and a kernel holds one
    pointer less, since AMD devices have few scalar registers."""
    if x_ptr.dtype.element_ty == tl.float32:
        return given_ptr
    else:
        return x_ptr


@triton.jit
def distance_tile(
    x_ptr,  # [B, D], as `centre.centred` has them
    r_ptr,  # [M, D]
    given_x_ptr,  # likewise, not moved
    given_r_ptr,
    x_norm_ptr,  # [B] fp32, squared
    r_norm_ptr,  # [M] fp32, squared
    offs_m,  # [m] rows of x
    offs_n,  # [n] rows of r
    D,
    IN_BATCH: tl.constexpr,
    DISTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RBF: tl.constexpr = False,
    gamma=0.0,
):
    """([m, n] distances; whether two of these rows are close).

    A distance is NaN where a row is not finite; with IN_BATCH that of a row to itself means
    nothing. Distances come from products, but from differences where rows are close, since the
    products cancel there. Rows that are sorted by label are close in few tiles. Coincident rows are
    at distance 0. With RBF, rows whose rounding would show in exp(-gamma d^2) count as close too.
    """
    # int64: a row number times D passes 2**31 on large inputs
    x_offs = offs_m.to(tl.int64) * D
    r_offs = offs_n.to(tl.int64) * D
    acc = product_tile(x_ptr + x_offs, r_ptr + r_offs, D, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    x_norm = tl.load(x_norm_ptr + offs_m)
    r_norm = tl.load(r_norm_ptr + offs_n)
    # in this order, so that nothing is rounded to the digits of the sum of the norms
    d2 = (x_norm[:, None] - acc) + (r_norm[None, :] - acc)
    size = x_norm[:, None] + r_norm[None, :]
    share = close_share(x_ptr, D)
    near = d2 < size * share
    if RBF:  # docs/ops/pairwise.md derives it
        if x_ptr.dtype.element_ty != tl.float32:
            gamma *= tl.minimum(4.0 * share, 1.0)
        near = near | (gamma * (size - 2.0 * d2) > 4.0)
    if IN_BATCH:
        near = near & (offs_m[:, None] != offs_n[None, :])
    close = tl.max(near.to(tl.int32))
    if close > 0:
        d2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for column in range(0, D):
            x_column = tl.load(unmoved(x_ptr, given_x_ptr) + x_offs + column).to(tl.float32)
            r_column = tl.load(unmoved(r_ptr, given_r_ptr) + r_offs + column).to(tl.float32)
            difference = x_column[:, None] - r_column[None, :]
            d2 += difference * difference
    finite = (x_norm < FINITE)[:, None] & (r_norm < FINITE)[None, :]
    d2 = tl.where(finite, tl.where(d2 > 0.0, d2, 0.0), float("nan"))
    if DISTANCE == EUCLIDEAN:
        d2 = tl.sqrt_rn(d2)
    elif DISTANCE != SQEUCLIDEAN:
        d2 = 0.5 * d2
    return d2, close


@triton.jit
def gradient_weight(weight, d, DISTANCE: tl.constexpr):
    """w of d(sum)/dx = w (x - r), given the derivative of the sum by the distance d of x and r; 0
    between coincident points."""
    if DISTANCE == EUCLIDEAN:
        return tl.where(d == 0.0, 0.0, weight / tl.where(d == 0.0, 1.0, d))
    elif DISTANCE == SQEUCLIDEAN:
        return 2.0 * weight
    else:
        return weight


@triton.jit
def margin_loss(u, SOFT: tl.constexpr):
    """(max(u, 0), or log(1 + e^u) with SOFT; its derivative). The loss is NaN where u is."""
    if SOFT:
        e = tl.exp(-tl.abs(u))
        # log(1 + e) with all digits: the rounding of 1 + e is made up for
        z = 1.0 + e
        log1p = tl.where(z == 1.0, e, tl.log(z) * e / tl.where(z == 1.0, 1.0, z - 1.0))
        return tl.where(u <= 0.0, 0.0, u) + log1p, tl.where(u > 0.0, 1.0, e) / z
    else:
        return tl.where(u <= 0.0, 0.0, u), tl.where(u > 0.0, 1.0, 0.0)
