// SPDX-License-Identifier: Apache-2.0
// The tiles of a symmetric product that are on or above its diagonal are numbered in one sequence.
#pragma once

#include <cmath>

#include "device.h"

namespace kdk::cuda {

struct TriangleTile {
  int64_t i, j;  // i <= j
};

__host__ __device__ constexpr int64_t triangle_tiles(int64_t n) { return n * (n + 1) / 2; }

// Returns tile number t of n x n tiles, counted row after row. The root is only a first guess.
__device__ __forceinline__ TriangleTile triangle_tile(int64_t t, int64_t n) {
  const double b = 2.0 * static_cast<double>(n) + 1.0;
  auto i = static_cast<int64_t>((b - sqrt(b * b - 8.0 * static_cast<double>(t))) / 2.0);
  const auto first = [&](int64_t row) { return row * n - row * (row - 1) / 2; };
  while (i > 0 && first(i) > t) --i;
  while (first(i + 1) <= t) ++i;
  return {i, i + t - first(i)};
}

}  // namespace kdk::cuda
