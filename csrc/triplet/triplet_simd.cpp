// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
#include "triplet_simd.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::triplet::KDK_SIMD_LEVEL {
namespace {

template <typename T>
void squared_distances(T* d, T norm, const T* norms, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T value = (norm + norms[j]) - T(2) * d[j];
    d[j] = value < T(0) ? T(0) : value;
  }
}

template <typename T>
void add_difference(T factor, const T* x, const T* y, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] += factor * (x[j] - y[j]);
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {squared_distances<T>, add_difference<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::triplet::KDK_SIMD_LEVEL
