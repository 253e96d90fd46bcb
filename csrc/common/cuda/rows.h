// SPDX-License-Identifier: Apache-2.0
// Each warp has one row of an operand.
#pragma once

#include "element.h"
#include "reduce.h"

namespace kdk::cuda {

inline constexpr int kRowsPerBlock = kThreads / 32;

template <typename T>
__device__ __forceinline__ const T* row_of(const Source& x, int64_t group, int64_t row) {
  return static_cast<const T*>(x.data) + group * x.group + row * x.stride;
}

// Returns |x|^2 of a row to all lanes.
template <typename T>
__device__ __forceinline__ double squared_norm(const T* row, int64_t D) {
  double sum = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    const double value = to_float(row[d]);
    sum += value * value;
  }
  return warp_sum(sum);
}

}  // namespace kdk::cuda
