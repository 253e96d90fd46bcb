// SPDX-License-Identifier: Apache-2.0
// Kernels whose contraction is split over the y axis of the grid learn here where a split ends, and
// store their tiles.
#pragma once

#include "main_loop.h"
#include "product.h"

namespace kdk::cuda {

// Returns where this block's part of the contraction ends. It begins at blockIdx.y * split_length.
__device__ __forceinline__ int64_t end_of_split(const ProductParams& p) {
  const int64_t counting = p.counting != nullptr && *p.counting < p.K ? *p.counting : p.K;
  const int64_t end = (blockIdx.y + 1) * p.split_length;
  return end < counting ? end : counting;
}

// Stores a staged tile, times `scale` and plus `add`.
template <typename T>
__device__ __forceinline__ void store_tile(float* tile, T* out, const float* add,
                                           const ProductParams& p, int64_t m0, int64_t n0,
                                           float scale) {
  const bool together = p.N % 8 == 0;
  for_each_eight(tile, p.M - m0, p.N - n0, [&](float (&x)[8], int row, int column) {
    const int64_t at = (m0 + row) * p.N + n0 + column, left = p.N - n0 - column;
    float more[8] = {};
    if (add != nullptr) read_eight(more, add + at, left, together);
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = x[e] * scale + more[e];
    store_eight(out + at, x, left, together);
  });
}

}  // namespace kdk::cuda
