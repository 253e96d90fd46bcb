// SPDX-License-Identifier: Apache-2.0
// This is the arithmetic of lsh_bce, on scalars or on GCC vectors of them. docs/ops/lsh_bce.md
// derives it.
#pragma once

#include "../common/exp_math.h"
#include "../common/quotient.h"

namespace kdk::lsh_bce {

// log1p(e) for e in [0, 1] is 2 atanh(s) with s = e / (2 + e) <= 1 / 3. The number of terms is the
// first for which the truncation error is below half a unit in the last place: 1.6e-8 in float,
// 1.8e-17 in double.
template <typename T>
inline constexpr int kLog1pTerms = sizeof(T) == sizeof(float) ? 7 : 16;

template <typename T, typename V>
KDK_HOST_DEVICE V log1p_unit(V e) {
  return two_atanh<T, kLog1pTerms<T>>(quotient<V>(e, e + T(2)));
}

// Returns the cross-entropy of one projection z and its bit y, 0 or 1, given e = exp(-|z|). max(z,
// 0) - z y is exact, and not finite where z is not.
template <typename T, typename V>
KDK_HOST_DEVICE V cross_entropy(V z, V y, V e) {
  return (z > T(0) ? z : V{}) - z * y + log1p_unit<T>(e);
}

// Returns sigmoid(z) - y without its cancellation: it is the sigmoid of z, or minus the sigmoid of
// -z.
template <typename T, typename V>
KDK_HOST_DEVICE V slope(V z, V y, V e) {
  const V sign = 1 - 2 * y;
  const V of_magnitude = quotient<V>(V{} + T(1), e + T(1));
  return sign * (sign * z >= T(0) ? of_magnitude : e * of_magnitude);
}

}  // namespace kdk::lsh_bce
