// SPDX-License-Identifier: Apache-2.0
// These are the vectorised epilogues of gram_mse on the CPU. Each instruction set has one table of
// them.
#pragma once

#include <cstdint>

#include "../common/matrix.h"
#include "../common/simd.h"
#include "gram_mse_math.h"

namespace kdk::gram_mse {

template <typename T>
struct Epilogues {
  // Adds a tile's row sums, kSums per row, to rows[i * kSums], and unless `cols` is null its column
  // sums to cols[s * n + j].
  void (*row_sums)(Matrix<const T> side, Matrix<const T> other, bool l1, double* rows,
                   double* cols);
  // Returns the sum over the tile of (A - K)^2, or of (f(A) - f(K))^2 if f is given.
  double (*squared_difference)(Matrix<const T> side, Matrix<const T> other, const Taylor<T>* f);
  // weights = linear_weight of each entry, in fp64: the rounding error of a coefficient would be
  // common to a whole row and add up in the product. a_i, b_i and c_i belong to rows of the tile,
  // a_j, b_j and c_j to its columns. `weights` may be one of the two tiles.
  void (*linear_weights)(Matrix<const T> side, Matrix<const T> other, const double* a_i,
                         const double* b_i, const double* c_i, const double* a_j, const double* b_j,
                         const double* c_j, Matrix<T> weights);
  // weights = factor taylor_weight
  void (*taylor_weights)(Matrix<const T> side, Matrix<const T> other, const Taylor<T>& f, T factor,
                         Matrix<T> weights);
};

KDK_SIMD_DECLARE(template <typename T> const Epilogues<T>& epilogues();)

template <typename T>
const Epilogues<T>& epilogues() {
  return KDK_SIMD_CALL(epilogues<T>)();
}

}  // namespace kdk::gram_mse
