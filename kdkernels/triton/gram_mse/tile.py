# SPDX-License-Identifier: Apache-2.0
"""What the tiled algorithms of gram_mse do with a tile of both Grams: the epilogues."""

from __future__ import annotations

import triton
import triton.language as tl

# What happens to Gram entries before the difference is squared.
ROW = tl.constexpr(0)  # divided by a norm of their row
PLAIN = tl.constexpr(1)  # nothing
TAYLOR = tl.constexpr(2)  # a polynomial


@triton.jit
def _exponent(g, two_gamma, two_gamma_low):
    """2 gamma g, with 2 gamma in two pieces: the rounding of one would be common to all entries."""
    return two_gamma * g + two_gamma_low * g


@triton.jit
def _polynomial(z, ORDER: tl.constexpr):
    """The sum over p = 1...ORDER of z^p / p!.

    Without p = 0: a difference of two values does not need it, and keeps more digits.
    """
    value = tl.full(z.shape, 1.0, tl.float32)
    for p in tl.static_range(ORDER, 1, -1):
        value = 1.0 + value * z * (1.0 / p)
    return z * value


@triton.jit
def _slope(z, ORDER: tl.constexpr):
    """The derivative of `_polynomial`."""
    value = tl.full(z.shape, 1.0, tl.float32)
    for p in tl.static_range(ORDER - 1, 0, -1):
        value = 1.0 + value * z * (1.0 / p)
    return value


@triton.jit
def squared_error(a, k, two_gamma, two_gamma_low, FORM: tl.constexpr, ORDER: tl.constexpr):
    """Of the entries of two Grams; for TAYLOR still to be multiplied by exp(-4 gamma)."""
    if FORM == TAYLOR:
        z_a = _exponent(a, two_gamma, two_gamma_low)
        z_k = _exponent(k, two_gamma, two_gamma_low)
        error = _polynomial(z_a, ORDER) - _polynomial(z_k, ORDER)
    else:
        error = a - k
    return error * error


@triton.jit
def _pair_sum(row_ptr, offs_m, offs_n, B):
    """x_m + x_n for a row x of coefficients."""
    x_m = tl.load(row_ptr + offs_m, mask=offs_m < B, other=0.0)
    x_n = tl.load(row_ptr + offs_n, mask=offs_n < B, other=0.0)
    return x_m[:, None] + x_n[None, :]


@triton.jit
def gram_weights(
    gram,  # tile of the Gram that is differentiated
    other,
    coef_ptr,  # [5, B]: rows a, b_s, b_t, c_s, c_t; their dtype is that of the arithmetic
    offs_m,
    offs_n,
    B,
    two_gamma,
    two_gamma_low,
    slope_factor,  # 8 gamma exp(-4 gamma)
    SIDE: tl.constexpr,  # 0 for the student's gradient, 1 for the teacher's
    FORM: tl.constexpr,
    L1: tl.constexpr,
    ORDER: tl.constexpr,
):
    """The tile W of dX = W X: dloss/dA + (dloss/dA)^T."""
    if FORM == TAYLOR:
        z = _exponent(gram, two_gamma, two_gamma_low)
        error = _polynomial(z, ORDER)
        error -= _polynomial(_exponent(other, two_gamma, two_gamma_low), ORDER)
        w = slope_factor * error * _slope(z, ORDER)
    elif FORM == PLAIN:
        w = 4.0 * (gram - other)
    else:
        b_ptr = coef_ptr + (1 + SIDE) * B
        c_ptr = coef_ptr + (3 + SIDE) * B
        a = _pair_sum(coef_ptr, offs_m, offs_n, B)
        w = _pair_sum(b_ptr, offs_m, offs_n, B) * gram + a * other
        if L1:
            c = _pair_sum(c_ptr, offs_m, offs_n, B)
            w += tl.where(gram > 0.0, c, tl.where(gram < 0.0, -c, 0.0))
        w = w.to(tl.float32)
    return w
