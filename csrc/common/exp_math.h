// SPDX-License-Identifier: Apache-2.0
// exp and log are written here for scalars and for GCC vectors of them.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace kdk {

// exp(-a) is 2^k exp(r) with k = round(-a / ln 2) and |r| <= ln(2) / 2, and exp(r) its Taylor
// polynomial. The order is the first whose truncation error relative to the result,
// r^(m + 1) / (m + 1)!, is below half a unit in the last place: 5.2e-9 in float, 4.2e-18 in double.
template <typename T>
struct ExpSeries;

template <>
struct ExpSeries<float> {
  using Integer = int32_t;
  static constexpr int kOrder = 7, kMantissa = 23, kBias = 127;
  // ln 2 in two pieces, the first of so few bits that k times it is exact
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves the integer in the low bits
  static constexpr float kLimit = 87;         // exp(-limit) is the least normal number, or above
};

template <>
struct ExpSeries<double> {
  using Integer = int64_t;
  static constexpr int kOrder = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLimit = 708;
};

inline constexpr double kInverseLn2 = 0x1.71547652b82fep0;

// V is T or a vector of them, I the integer or vector of integers of the same size. From kLimit on,
// infinity included, the result is exp(-kLimit), never 0. NaN stays NaN.
template <typename T, typename V, typename I>
KDK_HOST_DEVICE V exp_minus(V a) {
  using S = ExpSeries<T>;
  a = a > S::kLimit ? V{} + S::kLimit : a;
  const V shifted = S::kRound - a * static_cast<T>(kInverseLn2), k = shifted - S::kRound;
  const V r = -a - k * S::kLn2High - k * S::kLn2Low;
  T factorial = 1;
  for (int i = 2; i <= S::kOrder; ++i) factorial *= i;
  V p = V{} + 1 / factorial;
  for (int i = S::kOrder; i >= 1; --i) {
    factorial /= i;
    p = p * r + 1 / factorial;
  }
  union Bits {
    V number;
    I integer;
  };
  // k + bias in the exponent's place: k lies in the low bits of `shifted`, under those of kRound
  Bits power{shifted};
  power.integer = (power.integer + S::kBias) << S::kMantissa;
  return p * power.number;
}

// log((1 + s) / (1 - s)) is 2 atanh(s), and atanh(s) / s its Taylor polynomial in s^2. With k terms
// the truncation error relative to the result is at most s^(2 k) / (2 k + 1) / (1 - s^2).
template <typename T, int kTerms, typename V>
KDK_HOST_DEVICE V two_atanh(V s) {
  const V s2 = s * s;
  V p = V{} + T(1) / (2 * kTerms - 1);
  for (int i = kTerms - 2; i >= 0; --i) p = p * s2 + T(1) / (2 * i + 1);
  return 2 * s * p;
}

// log(x) is k ln 2 + log(m) with m in [sqrt(1/2), sqrt(2)), so that |s| <= 0.1716 for
// s = (m - 1) / (m + 1). The number of terms is the first for which the truncation error is below
// half a unit in the last place: 2.1e-9 in float, 2.4e-17 in double. For positive normal numbers,
// and within 4 units of rounding error (2^-24, 2^-53) of the exact value relative to it; infinity
// and NaN stay, 0 gives minus infinity.
template <typename T>
inline constexpr int kLogTerms = sizeof(T) == sizeof(float) ? 5 : 10;

template <typename T, typename V, typename I>
KDK_HOST_DEVICE V log_positive(V x) {
  using S = ExpSeries<T>;
  union Bits {
    V number;
    I integer;
  };
  const Bits root{V{} + static_cast<T>(0x1.6a09e667f3bcdp-1)}, bits{x};
  const I exponent = (bits.integer - root.integer) >> S::kMantissa;
  Bits mantissa;
  mantissa.integer = bits.integer - (exponent << S::kMantissa);
  // the integer as a number of T: added to the low bits of kRound
  Bits shifted{V{} + S::kRound};
  shifted.integer += exponent;
  const V k = shifted.number - S::kRound, m = mantissa.number;
  const V log_m = two_atanh<T, kLogTerms<T>>((m - T(1)) / (m + T(1)));
  const V log = k * S::kLn2High + (k * S::kLn2Low + log_m);
  constexpr T kInfinity = __builtin_huge_valf();
  return x > T(0) ? (x < kInfinity ? log : x) : (x == T(0) ? V{} - kInfinity : x);
}

}  // namespace kdk
