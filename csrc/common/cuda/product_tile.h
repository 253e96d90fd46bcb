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

// From where the tile is staged: sixteen threads have a row, eight neighbouring columns each.
template <typename T>
__device__ __forceinline__ void store_tile(float* tile, T* out, const float* add,
                                           const ProductParams& p, int64_t m0, int64_t n0,
                                           float scale) {
  constexpr int kAcross = kTile / 8;
  const int column = threadIdx.x % kAcross * 8;
  const int64_t left = p.N - n0 - column;
  const bool together = p.N % 8 == 0;
  if (left <= 0) return;
  for (int row = threadIdx.x / kAcross; row < kTile && m0 + row < p.M; row += kThreads / kAcross) {
    const int64_t at = (m0 + row) * p.N + n0 + column;
    float x[8], more[8] = {};
    load_eight(x, tile, row, column);
    if (add != nullptr) read_eight(more, add + at, left, together);
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = x[e] * scale + more[e];
    store_eight(out + at, x, left, together);
  }
}

}  // namespace kdk::cuda
