// SPDX-License-Identifier: Apache-2.0
// These are the gathering loops of sampled_similarity on the CPU. Each instruction set has one
// table of them.
#pragma once

#include <cstdint>

#include "../common/half_math.h"
#include "../common/simd.h"

namespace kdk::sampled_similarity {

// The loops run over the rows bank + index[k] stride, k < n, of D contiguous numbers each. E is the
// type of the bank's numbers, which is T or a narrower one.
template <typename T, typename E>
struct Loops {
  // out[k] = <x, row k>
  void (*dots)(const T* x, const E* bank, int64_t stride, const int64_t* index, int64_t n,
               int64_t D, T* out);
  // out = sum over k of weights[k] row k, added in the order of k
  void (*weighted_sum)(const T* weights, const E* bank, int64_t stride, const int64_t* index,
                       int64_t n, int64_t D, T* out);
  // returns whether all numbers are finite
  bool (*all_finite)(const T* x, int64_t n);
};

KDK_SIMD_DECLARE(template <typename T, typename E> const Loops<T, E>& loops();)

template <typename T, typename E>
const Loops<T, E>& loops() {
  return KDK_SIMD_CALL(loops<T, E>)();
}

}  // namespace kdk::sampled_similarity
