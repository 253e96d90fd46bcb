// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "integers.h"
#include "matrix.h"
#include "simd.h"

namespace kdk {

inline constexpr int64_t kSyrkDepth = 256;  // of x, packed at a time
inline constexpr int64_t kSyrkPanel =
    32;  // widest panel of rows, over the instruction sets and types

// Elements of scratch that syrk needs for m rows.
inline int64_t syrk_scratch(int64_t m) { return round_up(m, kSyrkPanel) * kSyrkDepth; }

// The upper triangle of out = x x^T, for x [m, k] with unit stride along either axis; what is below
// the diagonal is left undefined. Half the products of a gemm, which BLAS has no stable-ABI entry
// for, and no loss of speed where m is small and k long.
KDK_SIMD_DECLARE(template <typename T> void syrk(Matrix<const T> x, T* scratch, Matrix<T> out);)

template <typename T>
void syrk(Matrix<const T> x, T* scratch, Matrix<T> out) {
  KDK_SIMD_CALL(syrk<T>)(x, scratch, out);
}

}  // namespace kdk
