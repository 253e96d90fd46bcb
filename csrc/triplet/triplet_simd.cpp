// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set (see ../common/simd.h).
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
T least_above(const T* d, T sign, T floor, const T* column_floors, T* column_keys, int64_t n) {
  constexpr T kInfinity = static_cast<T>(__builtin_inf());
  T least = kInfinity;
  if (column_keys == nullptr) {
#pragma omp simd reduction(min : least)
    for (int64_t j = 0; j < n; ++j) {
      const T key = sign * d[j], here = key > floor ? key : kInfinity;
      least = here < least ? here : least;
    }
    return least;
  }
#pragma omp simd reduction(min : least)
  for (int64_t j = 0; j < n; ++j) {
    const T key = sign * d[j];
    const T here = key > floor ? key : kInfinity, there = key > column_floors[j] ? key : kInfinity;
    least = here < least ? here : least;
    column_keys[j] = there < column_keys[j] ? there : column_keys[j];
  }
  return least;
}

template <typename T>
void add_difference(T factor, const T* x, const T* y, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] += factor * (x[j] - y[j]);
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {squared_distances<T>, least_above<T>, add_difference<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::triplet::KDK_SIMD_LEVEL
