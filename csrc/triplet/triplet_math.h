// SPDX-License-Identifier: Apache-2.0
// The CPU and CUDA kernels of triplet share here which candidate wins.
#pragma once

#include <cstdint>
#include <limits>

#include "../common/rows_math.h"

namespace kdk::triplet {

// Every distance to or from a row that is not finite (kNormLimit) is NaN; NaN is chosen before
// every other distance, and everything is beyond it.

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
