// SPDX-License-Identifier: Apache-2.0
// Matrix products through the BLAS that torch carries, reached by the stable C shim.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"
#include "stable.h"

namespace kdk {

// c = a b + beta c, for beta 0 (c may be uninitialised) or 1. Any strides; unit stride along one
// axis is fast.
template <typename T>
void gemm(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int beta = 0);

// out = x y^T, with a contraction that may be long: x [m, k], y [n, k].
// If symmetric (x y^T equals its transpose), only the blocks on and above the diagonal are
// multiplied, then mirrored.
template <typename T>
struct Gram {
  Matrix<const T> x, y;
  Matrix<T> out;
  bool symmetric;
};

// Several such products at once, cut into tasks over output blocks and, where those are few, over
// the contraction. The cut depends on the shapes alone and partial sums are added in a fixed order.
// (BLAS itself rounds differently with other numbers of threads where a product is not cut.)
template <typename T>
void grams(const std::vector<Gram<T>>& jobs);

}  // namespace kdk
