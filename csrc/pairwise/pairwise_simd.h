// SPDX-License-Identifier: Apache-2.0
// These are the vectorised loops of pairwise on the CPU. Each instruction set has one table of
// them.
#pragma once

#include <cstdint>

#include "../common/simd.h"
#include "pairwise_math.h"

namespace kdk::pairwise {

template <typename T>
struct Loops {
  // Squared distances d2_j from products become -1 where is_sharp. Returns how many are.
  int64_t (*mark_sharp)(T* d2, T norm, const T* norms, T gamma, int64_t n);
  // d2_j = exp(-gamma d2_j)
  void (*rbf)(T* d2, T gamma, int64_t n);
  // returns how many of the pairs are close (is_close)
  int64_t (*close)(const T* value, T bound, const T* bounds, Metric metric, int64_t n);
  // weight_j *= slope(value_j). Returns the sum of the weights, and adds weight_j to column_sums_j.
  double (*slopes)(const T* value, T* weight, Metric metric, T factor, int64_t n,
                   double* column_sums);
  // sum = factor x - sum
  void (*finish)(double factor, const T* x, T* sum, int64_t n);
  // sum -= factor (x - y)
  void (*subtract_difference)(double factor, const T* x, const T* y, T* sum, int64_t n);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::pairwise
