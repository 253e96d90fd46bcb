// SPDX-License-Identifier: Apache-2.0
// The arithmetic of triplet, shared by the CPU and CUDA kernels: distances, their derivatives, and
// which candidate wins.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <type_traits>

#include "../common/rows_math.h"

namespace kdk::triplet {

// Every distance to or from a row that is not finite (kNormLimit) is NaN; NaN is chosen before
// every other distance, and everything is beyond it.

enum class Distance { kEuclidean, kSqEuclidean, kCosine };

inline Distance parse_distance(std::string_view name) {
  return name == "euclidean"     ? Distance::kEuclidean
         : name == "sqeuclidean" ? Distance::kSqEuclidean
                                 : Distance::kCosine;
}

// A distance in terms of the squared Euclidean one; cosine is for unit vectors.
template <typename T = double>
KDK_HOST_DEVICE T from_squared(std::type_identity_t<T> d2, Distance distance) {
  return distance == Distance::kEuclidean     ? std::sqrt(d2)
         : distance == Distance::kSqEuclidean ? d2
                                              : T(0.5) * d2;
}

// The factor w of d(distance)/dx = w (x - y); 0 at coincident points, where the square root has no
// derivative.
template <typename T = double>
KDK_HOST_DEVICE T slope(std::type_identity_t<T> d, Distance distance) {
  if (distance == Distance::kEuclidean) return d > 0 || d != d ? 1 / d : 0;
  return distance == Distance::kSqEuclidean ? 2 : 1;
}

// The key of a distance that is NaN.
template <typename T>
inline constexpr T kNanKey = -std::numeric_limits<T>::infinity();

// The winner so far of one anchor: the smallest key, and among equal keys the lowest row. The key
// is the squared distance times +1 to look for the nearest, -1 for the farthest.
template <typename T>
struct Best {
  T key;
  int64_t row;  // -1: none
};

template <typename T>
KDK_HOST_DEVICE bool better(T key, int64_t row, const Best<T>& than) {
  return than.row < 0 || key < than.key || (key == than.key && row < than.row);
}

}  // namespace kdk::triplet
