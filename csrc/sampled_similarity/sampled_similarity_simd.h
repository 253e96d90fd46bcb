// SPDX-License-Identifier: Apache-2.0
// These are the gathering loops of sampled_similarity on the CPU. Each instruction set has one
// table of them.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::sampled_similarity {

// The loops run over the rows bank + index[k] D, k < n, of D contiguous numbers each.
template <typename T>
struct Loops {
  // out[k] = <x, row k>
  void (*dots)(const T* x, const T* bank, const int64_t* index, int64_t n, int64_t D, T* out);
  // out = sum over k of weights[k] row k, added in the order of k
  void (*weighted_sum)(const T* weights, const T* bank, const int64_t* index, int64_t n, int64_t D,
                       T* out);
  // returns whether all numbers are finite
  bool (*all_finite)(const T* x, int64_t n);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::sampled_similarity
