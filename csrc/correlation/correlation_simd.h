// SPDX-License-Identifier: Apache-2.0
// The vectorised loops of correlation on the CPU, one table of functions per instruction set. a is
// the student's probabilities, b the teacher's.
#pragma once

#include <cstdint>

#include "../common/matrix.h"
#include "../common/simd.h"
#include "correlation_math.h"

namespace kdk::correlation {

// y = exp(z / temperature - max) inverse
template <typename T>
struct Softmax {
  T max, inverse;
};

// Moments of columns over rows seen so far, arrays of C. The means are 0 where they stay in.
struct Columns {
  double *mean_a, *mean_b, *aa, *bb, *ab;
};

// What the gradient takes of each column, arrays of C.
template <typename T>
struct ColumnFactors {
  const T *mean_a, *mean_b, *side, *other;
};

template <typename T>
struct RowFactors {
  Softmax<T> a, b;
  T centre, side, other;
};

template <typename T>
struct Loops {
  // y = softmax(z / temperature)
  Softmax<T> (*softmax)(const T* z, int64_t n, T temperature, T* y);
  // of a - centre and b - centre
  Moments (*moments)(const T* a, const T* b, int64_t n, T centre);
  // Adds rows to the moments of columns, of which `before` have been.
  void (*add_rows)(Matrix<const T> a, Matrix<const T> b, int64_t before, bool centered,
                   const Columns& columns);
  // Adds to the moments `into` of `before` rows those of `count` other rows.
  void (*merge)(const Columns& from, int64_t count, int64_t before, int64_t n, const Columns& into);
  // dz of a row: the factors times a and b are the derivative by the probabilities, up to the
  // temperature. y: scratch, [n]
  void (*gradient)(const T* z_a, const T* z_b, int64_t n, T temperature, const RowFactors<T>& row,
                   const ColumnFactors<T>& columns, T* y, T* dz);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::correlation
