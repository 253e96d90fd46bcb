// SPDX-License-Identifier: Apache-2.0
// These are the vectorised loops of correlation on the CPU. Each instruction set has one table of
// them. The student's probabilities are called a, the teacher's b.
#pragma once

#include <cstdint>

#include "../common/matrix.h"
#include "../common/simd.h"
#include "correlation_math.h"

namespace kdk::correlation {

// What a row's probabilities y = exp(z / temperature - max) inverse are computed from.
template <typename T>
struct Softmax {
  T max, inverse;
};

// Moments of columns over the rows seen so far, each an array of C. Where the means are not taken
// out, they are 0 here.
struct Columns {
  double *mean_a, *mean_b, *aa, *bb, *ab;
};

// What the gradient of a row needs to know of each column, each an array of C.
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
  // returns the moments of a - centre and b - centre
  Moments (*moments)(const T* a, const T* b, int64_t n, T centre);
  // Adds rows to the moments of columns, which hold `before` rows already.
  void (*add_rows)(Matrix<const T> a, Matrix<const T> b, int64_t before, bool centered,
                   const Columns& columns);
  // Adds the moments `from` of `count` rows to the moments `into` of `before` other rows.
  void (*merge)(const Columns& from, int64_t count, int64_t before, int64_t n, const Columns& into);
  // Computes dz of a row. The factors times a and b are the derivative by the probabilities, up to
  // the temperature. y [n] is scratch memory.
  void (*gradient)(const T* z_a, const T* z_b, int64_t n, T temperature, const RowFactors<T>& row,
                   const ColumnFactors<T>& columns, T* y, T* dz);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::correlation
