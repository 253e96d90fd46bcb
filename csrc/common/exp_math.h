// SPDX-License-Identifier: Apache-2.0
// exp for scalars or for GCC vectors of them.
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

}  // namespace kdk
