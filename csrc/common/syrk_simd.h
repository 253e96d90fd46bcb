// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "integers.h"
#include "matrix.h"
#include "simd.h"

namespace kdk {

// Columns of x that are packed at a time.
inline constexpr int64_t kSyrkDepth = 256;
// Rows of the widest panel, over the instruction sets and types.
inline constexpr int64_t kSyrkPanel = 32;

// Returns how many elements of scratch memory syrk needs for m rows.
inline int64_t syrk_scratch(int64_t m) { return round_up(m, kSyrkPanel) * kSyrkDepth; }

// Computes the upper triangle of out = x x^T, for x [m, k] with unit stride along either axis, and
// leaves the lower triangle undefined. It takes half the products of a gemm, and is no slower where
// m is small and k is long. The stable ABI has no entry for the syrk of BLAS.
KDK_SIMD_DECLARE(template <typename T> void syrk(Matrix<const T> x, T* scratch, Matrix<T> out);)

template <typename T>
void syrk(Matrix<const T> x, T* scratch, Matrix<T> out) {
  KDK_SIMD_CALL(syrk<T>)(x, scratch, out);
}

}  // namespace kdk
