// SPDX-License-Identifier: Apache-2.0
// How the tiles of a product end: splits of the contraction, which are the y axis of the grid, are
// merged, and stored.
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

// Adds up the partial tiles of all splits in their order, in whichever block comes last; whether
// this is that block.
__device__ __forceinline__ bool merge_splits(Accumulators& acc, const ProductParams& p,
                                             int64_t tile, unsigned char* shared) {
  const int64_t tiles = p.tiles * gridDim.z;
  const auto part = [&](int64_t split) {
    return p.partials + (split * tiles + tile) * kTile * kTile + threadIdx.x;
  };
  float* mine = part(blockIdx.y);
  for_each_accumulator([&](int i, int j, int c, int, int) {
    mine[((i * 4 + j) * 4 + c) * kThreads] = acc[i][j][c];
  });
  __threadfence();
  __syncthreads();
  auto* ticket = reinterpret_cast<unsigned*>(shared);
  if (threadIdx.x == 0) *ticket = atomicAdd(p.tickets + tile, 1u);
  __syncthreads();
  if (*ticket + 1 < static_cast<unsigned>(p.splits)) return false;
  __threadfence();
  fill(acc, 0);
  for (int split = 0; split < p.splits; ++split) {
    const float* theirs = part(split);
    for_each_accumulator([&](int i, int j, int c, int, int) {
      acc[i][j][c] += theirs[((i * 4 + j) * 4 + c) * kThreads];
    });
  }
  return true;
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
      if (row < p.M && column < p.N)
        store_pair(out + row * p.N + column, acc[i / 2][j][i % 2 * 2] * scale,
                   acc[i / 2][j][i % 2 * 2 + 1] * scale, column + 1 < p.N, together);
    }
  }
}

}  // namespace kdk::cuda
