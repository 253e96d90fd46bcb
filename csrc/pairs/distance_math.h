// SPDX-License-Identifier: Apache-2.0
// The CPU and CUDA kernels share these distances of labelled rows and their derivatives.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/quotient.h"

namespace kdk::pairs {

enum class Distance { kEuclidean, kSqEuclidean, kCosine };

// Returns a distance, given the squared Euclidean one. kCosine is for unit vectors.
template <typename T = double>
KDK_HOST_DEVICE T from_squared(std::type_identity_t<T> d2, Distance distance) {
  return distance == Distance::kEuclidean     ? std::sqrt(d2)
         : distance == Distance::kSqEuclidean ? d2
                                              : T(0.5) * d2;
}

// Returns the factor w of d(distance)/dx = w (x - y). It is 0 at coincident points, where the
// square root has no derivative.
template <typename T = double>
KDK_HOST_DEVICE T slope(std::type_identity_t<T> d, Distance distance) {
  if (distance == Distance::kEuclidean) return d > 0 || d != d ? quotient<T>(1, d) : 0;
  return distance == Distance::kSqEuclidean ? 2 : 1;
}

}  // namespace kdk::pairs
