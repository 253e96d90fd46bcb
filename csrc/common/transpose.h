// SPDX-License-Identifier: Apache-2.0
// The `*_simd.cpp` (see simd.h) transpose blocks of 4 x 4 floats in registers.
#pragma once

namespace kdk {

typedef float FloatRow __attribute__((vector_size(16), aligned(4)));

inline __attribute__((always_inline)) void transpose(const FloatRow (&rows)[4],
                                                     FloatRow (&columns)[4]) {
  const FloatRow a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const FloatRow b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const FloatRow c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const FloatRow d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  columns[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  columns[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  columns[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  columns[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

}  // namespace kdk
