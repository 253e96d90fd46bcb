// SPDX-License-Identifier: Apache-2.0
// The arithmetic of pairwise, shared by the CPU and CUDA kernels. Derivation: docs/ops/pairwise.md.
#pragma once

#include "../common/host_device.h"

namespace kdk::pairwise {

enum class Metric { kDot, kCosine, kEuclidean, kSqEuclidean, kRbf };

// Whether values are functions of x - y.
KDK_HOST_DEVICE bool is_distance(Metric metric) {
  return metric != Metric::kDot && metric != Metric::kCosine;
}

// w of dvalue/dx = w (x - y) and dvalue/dy = w (y - x), from the value itself; 0 between coincident
// points. factor: -2 gamma (kRbf).
template <Metric kMetric, typename T>
KDK_HOST_DEVICE T slope(T value, T factor) {
  if constexpr (kMetric == Metric::kEuclidean) {
    return value == T(0) ? T(0) : T(1) / value;
  } else if constexpr (kMetric == Metric::kSqEuclidean) {
    return T(2);
  } else {
    return factor * value;
  }
}

// Whether two rows are so close that products of them lose their distance (pairs::kClose), from the
// value and a bound of each row: kRbf exp(-gamma kClose |x|^2), else kClose |x|^2. False for NaN.
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

}  // namespace kdk::pairwise
