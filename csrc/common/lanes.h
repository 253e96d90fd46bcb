// SPDX-License-Identifier: Apache-2.0
// The widest vectors of an instruction set, for the `*_simd.cpp` (see simd.h).
#pragma once

#include <cstdint>

#include "exp_math.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::KDK_SIMD_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Lanes {
  static constexpr int kCount = kVectorBytes / sizeof(T);
  using Integer = typename ExpSeries<T>::Integer;
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T))));
  typedef Integer Integers __attribute__((vector_size(kVectorBytes), aligned(sizeof(Integer))));
};

}  // namespace kdk::KDK_SIMD_LEVEL
