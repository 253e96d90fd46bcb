// SPDX-License-Identifier: Apache-2.0
// The candidates of a search are integers here, so the least of them is the same in any order.
#pragma once

#include <limits>

#include "element.h"
#include "reduce.h"
#include "winner.h"

namespace kdk::cuda {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

__device__ __forceinline__ Winner pack(float key, int64_t row) {
  const uint32_t bits = bits_of(key);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Winner>(ordered) << 32 | static_cast<uint32_t>(row);
}

__device__ __forceinline__ float key_of(Winner winner) {
  if (winner == kNoWinner) return kInfinity;
  const auto ordered = static_cast<uint32_t>(winner >> 32);
  return float_of(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ int64_t row_of(Winner winner) {
  return winner == kNoWinner ? -1 : static_cast<int64_t>(winner & 0xffffffffu);
}

template <int kFirst, int kLast>
__device__ __forceinline__ Winner lane_min(Winner x) {
  KDK_UNROLL
  for (int mask = kFirst; mask <= kLast; mask *= 2) {
    const Winner other = __shfl_xor_sync(kWarp, x, mask);
    x = other < x ? other : x;
  }
  return x;
}

}  // namespace kdk::cuda
