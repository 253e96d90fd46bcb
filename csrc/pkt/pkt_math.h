// SPDX-License-Identifier: Apache-2.0
// This is the arithmetic of pkt, on scalars or on GCC vectors of them. docs/ops/pkt.md derives it
// and explains the names.
#pragma once

#include "../common/exp_math.h"

namespace kdk::pkt {

enum class Kernel { kCosine, kStudentT };
enum class Divergence { kKl, kJeffreys };

inline constexpr double kKlEps = 1e-7;        // in the logarithms, and of the norms with "kl"
inline constexpr double kJeffreysEps = 1e-6;  // of the norms with "jeffreys"
inline constexpr double kDistanceEps = 1e-6;  // added to squared distances

// Returns (<u_i, u_j> + 1) / 2, but no less than it can be: for rows that point apart it is almost
// 0, and rounding would make it negative. a is 1 - |u|.
template <typename T, typename V>
KDK_HOST_DEVICE V cosine_similarity(V product, T a_i, V a_j) {
  const V k = (product + T(1)) * T(0.5), floor = (a_i + a_j - a_i * a_j) * T(0.5);
  return k < floor ? floor : k;  // keeps NaN
}

// These return the terms of the divergence, and their derivatives by p. To the derivative of kKl 1
// is added: a constant in a row changes no gradient, and like this p - q is taken once.
template <Divergence kDivergence, typename T, typename V, typename I>
KDK_HOST_DEVICE V term(V p, V q) {
  if constexpr (kDivergence == Divergence::kKl) {
    constexpr T eps = static_cast<T>(kKlEps);
    return q * log_positive<T, V, I>((q + eps) / (p + eps));
  } else {
    return (q - p) * log_positive<T, V, I>(q / p);
  }
}

template <Divergence kDivergence, typename T, typename V, typename I>
KDK_HOST_DEVICE V slope(V p, V q) {
  if constexpr (kDivergence == Divergence::kKl) {
    constexpr T eps = static_cast<T>(kKlEps);
    return (p - q + eps) / (p + eps);
  } else {
    return (p - q) / p - log_positive<T, V, I>(q / p);
  }
}

// dK / d(d^2) of student_t.
template <typename V>
KDK_HOST_DEVICE V student_t_slope(V k, V d) {
  return -k * k / (2 * d);
}

}  // namespace kdk::pkt
