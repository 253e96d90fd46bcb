// SPDX-License-Identifier: Apache-2.0
// A warp moves a row by a point.
#pragma once

#include "../rows_math.h"
#include "rows.h"

namespace kdk::cuda {

// Stores a row less the point in `to`, and returns its squared norm to all lanes. Without a point
// it stores nothing. Where the row given is not finite, the result is infinite or NaN.
template <typename T>
__device__ __forceinline__ double move_row(const T* from, const float* point, int64_t D,
                                           float* to) {
  const double given = squared_norm(from, D);
  if (point == nullptr || !(static_cast<float>(given) < kNormLimit<float>)) {
    for (int64_t d = threadIdx.x % 32; point != nullptr && d < D; d += 32)
      to[d] = to_float(from[d]);
    return given;
  }
  double moved = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    const float x = to_float(from[d]) - point[d];
    to[d] = x;
    moved += static_cast<double>(x) * x;
  }
  return warp_sum(moved);
}

}  // namespace kdk::cuda
