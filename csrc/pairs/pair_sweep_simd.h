// SPDX-License-Identifier: Apache-2.0
// These are the vectorised loops over tiles of pairs. Each instruction set has one table of them.
#pragma once

#include <cstdint>

#include "../common/matrix.h"
#include "../common/simd.h"
#include "distance_math.h"

namespace kdk::pairs {

template <typename T>
struct Loops {
  // Products d_j = <x, y_j> become distances, except that d_j of a close pair (kClose) becomes -1.
  // Returns how many pairs are close.
  int64_t (*distances)(T* d, T norm, const T* norms, int64_t n, Distance distance);
  // Does the same with the norms and their sums in fp64. This is for callers that subtract
  // distances from each other: the rounding of a norm is common to a whole row of them and adds up.
  int64_t (*distances_wide)(T* d, double norm, const double* norms, int64_t n, Distance distance);
  // weight_j *= slope(d_j). Returns the sum of the weights, and adds weight_j to column_sums_j.
  double (*slopes)(const T* d, T* weight, double* column_sums, int64_t n, Distance distance);
  // out = factor x - sum
  void (*finish)(double factor, const T* x, const double* sum, T* out, int64_t n);
  // sum -= factor (x - y)
  void (*subtract_difference)(double factor, const T* x, const T* y, double* sum, int64_t n);
  // Returns the least key_j = sign d_j above `floor`, or infinity if there is none. Where key_j is
  // above column_floors_j, column_keys_j becomes the lesser of itself and key_j. column_keys may be
  // null.
  T (*least_above)(const T* d, T sign, T floor, const T* column_floors, T* column_keys, int64_t n);
  // Whether a key, sign d_j, is above `low` and at most `high`.
  bool (*any_key_within)(const T* d, T sign, T low, T high, int64_t n);
  // to = from^T, or to += from^T
  void (*transpose)(Matrix<const T> from, Matrix<T> to);
  void (*add_transpose)(Matrix<const T> from, Matrix<T> to);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::pairs
