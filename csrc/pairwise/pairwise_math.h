// SPDX-License-Identifier: Apache-2.0
// The CPU and CUDA kernels share this arithmetic of pairwise. docs/ops/pairwise.md derives it.
#pragma once

#include <cmath>

#include "../common/quotient.h"
#include "../common/rows_math.h"

namespace kdk::pairwise {

enum class Metric { kDot, kCosine, kEuclidean, kSqEuclidean, kRbf };

// Returns whether values are functions of x - y.
KDK_HOST_DEVICE bool is_distance(Metric metric) {
  return metric != Metric::kDot && metric != Metric::kCosine;
}

// Returns w of dvalue/dx = w (x - y) and dvalue/dy = w (y - x), from the value itself. It is 0
// between coincident points. `factor` is -2 gamma, for kRbf.
template <Metric kMetric, typename T>
KDK_HOST_DEVICE T slope(T value, T factor) {
  if constexpr (kMetric == Metric::kEuclidean) {
    return value == T(0) ? T(0) : quotient<T>(1, value);
  } else if constexpr (kMetric == Metric::kSqEuclidean) {
    return T(2);
  } else {
    return factor * value;
  }
}

// Returns whether two rows are so close that products of them lose their distance, from the value
// and a bound of each row: with s the share of kdk::kClose, exp(-gamma s |x|^2) for kRbf, else
// s |x|^2.
// Returns false for NaN.
template <Metric kMetric, typename T>
KDK_HOST_DEVICE bool is_close(T value, T bound, T other) {
  if constexpr (kMetric == Metric::kEuclidean) {
    return value * value <= bound + other;
  } else if constexpr (kMetric == Metric::kSqEuclidean) {
    return value <= bound + other;
  } else {
    return value >= bound * other && value > T(0);
  }
}

// Returns whether the rounding of products would show in exp(-gamma d2), for rows whose squared
// norms add up to `size`; docs/ops/pairwise.md derives the bound. Returns false for NaN.
template <typename T>
KDK_HOST_DEVICE bool is_sharp(T d2, T size, T gamma) {
  return gamma * (size - T(2) * d2) > T(4);
}

// slope and is_close for a metric that is known at run time and is a distance.
template <typename T>
KDK_HOST_DEVICE T slope(Metric metric, T value, T factor) {
  return metric == Metric::kEuclidean     ? slope<Metric::kEuclidean>(value, factor)
         : metric == Metric::kSqEuclidean ? slope<Metric::kSqEuclidean>(value, factor)
                                          : slope<Metric::kRbf>(value, factor);
}

template <typename T>
KDK_HOST_DEVICE bool is_close(Metric metric, T value, T bound, T other) {
  return metric == Metric::kEuclidean     ? is_close<Metric::kEuclidean>(value, bound, other)
         : metric == Metric::kSqEuclidean ? is_close<Metric::kSqEuclidean>(value, bound, other)
                                          : is_close<Metric::kRbf>(value, bound, other);
}

// Returns a distance, given the squared Euclidean one.
template <typename T>
KDK_HOST_DEVICE T from_squared(Metric metric, T d2, T gamma) {
  return metric == Metric::kEuclidean     ? std::sqrt(d2)
         : metric == Metric::kSqEuclidean ? d2
                                          : std::exp(-gamma * d2);
}

// Returns the bound of a row for is_close, from its squared norm.
template <typename T>
KDK_HOST_DEVICE T close_bound(Metric metric, T norm, double gamma, T share = kClose<T>) {
  const T bound = norm * share;
  return metric == Metric::kRbf ? static_cast<T>(std::exp(-gamma * bound)) : bound;
}

}  // namespace kdk::pairwise
