// SPDX-License-Identifier: Apache-2.0
// These are the vectorised epilogues of pkt on the CPU. Each instruction set has one table of them.
#pragma once

#include <cstdint>

#include "../common/matrix.h"
#include "../common/simd.h"
#include "pkt_math.h"

namespace kdk::pkt {

// The numbers that a stretch of rows brings to a tile, as its rows i or as its columns j.
template <typename T>
struct Stretch {
  const T* inverse[2];  // of student and teacher: 1 / Z
  const T* r;           // student_t: what a row's slopes lose; null for 0
};

template <typename T>
struct Epilogues {
  // cosine: turns inner products x into K; self: 1 - |u|.
  void (*cosines)(Matrix<T> x, const T* self_i, const T* self_j);
  // student_t: turns n squared distances into K, and writes the roots that K is made of to
  // `distance` unless it is null.
  void (*student_t)(T* x, T* distance, int64_t n);
  // Adds the sums of rows to `rows`, and the sums of columns to `cols` unless it is null.
  void (*sums)(Matrix<const T> k, double* rows, T* cols);
  // Returns the sum of the terms of all (i, j) and, if cols is given, all (j, i). Adds sum_j p
  // slope to rows, and to cols.
  double (*loss)(Matrix<const T> k_s, Matrix<const T> k_t, const Stretch<T>& i, const Stretch<T>& j,
                 Divergence divergence, double* rows, T* cols);
  // k_s becomes dL/dK_ij + dL/dK_ji, without r where it is null. For student_t, with `distance`, it
  // becomes the sum of the derivatives by the squared distances, which is 0 where `distance` is
  // infinite, and is added up in rows and, if given, cols.
  void (*weights)(Matrix<T> k_s, Matrix<const T> k_t, const Matrix<T>* distance,
                  const Stretch<T>& i, const Stretch<T>& j, Divergence divergence, double* rows,
                  T* cols);
  // sum -= factor (x - y)
  void (*subtract_difference)(double factor, const T* x, const T* y, T* sum, int64_t n);
};

KDK_SIMD_DECLARE(template <typename T> const Epilogues<T>& epilogues();)

template <typename T>
const Epilogues<T>& epilogues() {
  return KDK_SIMD_CALL(epilogues<T>)();
}

}  // namespace kdk::pkt
