// SPDX-License-Identifier: Apache-2.0
// Tiles of products whose contraction is split over the y axis of the grid: where a split ends, and
// how a tile is stored.
#pragma once

#include "main_loop.h"
#include "product.h"

namespace kdk::cuda {

// Where this block's part of the contraction ends; it begins at blockIdx.y * split_length.
__device__ __forceinline__ int64_t end_of_split(const ProductParams& p) {
  const int64_t counting = p.counting != nullptr && *p.counting < p.K ? *p.counting : p.K;
  const int64_t end = (blockIdx.y + 1) * p.split_length;
  return end < counting ? end : counting;
}

template <typename T>
__device__ __forceinline__ void store_tile(const Accumulators& acc, T* out, const ProductParams& p,
                                           int64_t m0, int64_t n0, float scale) {
  const bool together = p.N % 2 == 0;
  KDK_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int64_t row = m0 + first_row() + 8 * i;
    KDK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t column = n0 + first_column() + 8 * j;
      if (row >= p.M || column >= p.N) continue;
      T* to = out + row * p.N + column;
      float x = acc[i / 2][j][i % 2 * 2] * scale, y = acc[i / 2][j][i % 2 * 2 + 1] * scale;
      if (p.add) {
        x += to_float(to[0]);
        if (column + 1 < p.N) y += to_float(to[1]);
      }
      store_pair(to, x, y, column + 1 < p.N, together);
    }
  }
}

}  // namespace kdk::cuda
