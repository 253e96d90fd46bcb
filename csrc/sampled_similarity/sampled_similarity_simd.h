// SPDX-License-Identifier: Apache-2.0
// The gathering loops of sampled_similarity on the CPU, one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::sampled_similarity {

// Loops over rows bank + index[k] D of D contiguous numbers, k < n.
template <typename T>
struct Loops {
  // out[k] = <x, row k>
  void (*dots)(const T* x, const T* bank, const int64_t* index, int64_t n, int64_t D, T* out);
  // out = sum over k of weights[k] row k, added in the order of k
  void (*weighted_sum)(const T* weights, const T* bank, const int64_t* index, int64_t n, int64_t D,
                       T* out);
  // whether no number is infinite or NaN
  bool (*all_finite)(const T* x, int64_t n);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::sampled_similarity
