// SPDX-License-Identifier: Apache-2.0
// The arithmetic of lsh_bce, on scalars or on GCC vectors of them. Derivation:
// docs/ops/lsh_bce.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/host_device.h"

namespace kdk::lsh_bce {

// exp(-a) for a >= 0 is 2^k exp(r) with k = round(-a / ln 2) and |r| <= ln(2) / 2, and exp(r) its
// Taylor polynomial. log1p(e) for e in [0, 1] is 2 atanh(s) with s = e / (2 + e) <= 1 / 3, and
// atanh(s) / s its Taylor polynomial in s^2. The orders are the first whose truncation errors,
// relative to the result, are below half a unit in the last place:
//                exp: r^(m + 1) / (m + 1)!     log1p: s^(2 k) / (2 k + 1) / (1 - s^2), k = terms
//   float                          5.2e-9                                           1.6e-8
//   double                         4.2e-18                                          1.8e-17
template <typename T>
struct Series;

template <>
struct Series<float> {
  using Integer = int32_t;
  static constexpr int kExpOrder = 7, kLogTerms = 7, kMantissa = 23, kBias = 127;
  // ln 2 in two pieces, the first of so few bits that k times it is exact
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves the integer in the low bits
  static constexpr float kLimit = 87;         // exp(-limit) is the least normal number, or above
};

template <>
struct Series<double> {
  using Integer = int64_t;
  static constexpr int kExpOrder = 13, kLogTerms = 16, kMantissa = 52, kBias = 1023;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLimit = 708;
};

inline constexpr double kInverseLn2 = 0x1.71547652b82fep0;

// V is T or a vector of them, I the integer or vector of integers of the same size. NaN stays NaN.
template <typename T, typename V, typename I>
KDK_HOST_DEVICE V exp_minus(V a) {
  using S = Series<T>;
  a = a > S::kLimit ? V{} + S::kLimit : a;
  const V shifted = S::kRound - a * static_cast<T>(kInverseLn2), k = shifted - S::kRound;
  const V r = -a - k * S::kLn2High - k * S::kLn2Low;
  T factorial = 1;
  for (int i = 2; i <= S::kExpOrder; ++i) factorial *= i;
  V p = V{} + 1 / factorial;
  for (int i = S::kExpOrder; i >= 1; --i) {
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

template <typename T, typename V>
KDK_HOST_DEVICE V log1p_unit(V e) {
  const V s = e / (e + T(2)), s2 = s * s;
  V p = V{} + T(1) / (2 * Series<T>::kLogTerms - 1);
  for (int i = Series<T>::kLogTerms - 2; i >= 0; --i) p = p * s2 + T(1) / (2 * i + 1);
  return 2 * s * p;
}

// Of one projection z and its bit y, 0 or 1, with e = exp(-|z|).
// max(z, 0) - z y is exact, and not finite where z is not.
template <typename T, typename V>
KDK_HOST_DEVICE V cross_entropy(V z, V y, V e) {
  return (z > T(0) ? z : V{}) - z * y + log1p_unit<T>(e);
}

// sigmoid(z) - y without its cancellation: the sigmoid of z, or minus that of -z.
template <typename T, typename V>
KDK_HOST_DEVICE V slope(V z, V y, V e) {
  const V sign = 1 - 2 * y;
  const V of_magnitude = 1 / (e + T(1));
  return sign * (sign * z >= T(0) ? of_magnitude : e * of_magnitude);
}

}  // namespace kdk::lsh_bce
