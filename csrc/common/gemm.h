// SPDX-License-Identifier: Apache-2.0
// Matrices are multiplied by the BLAS that torch carries, which is reached through the stable C
// shim.
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

// Makes several such products at once. They are cut into tasks over blocks of the output and, where
// there are few blocks, over the contraction. The cut depends on the shapes alone and partial sums
// are added in a fixed order. (BLAS itself rounds differently with other numbers of threads where a
// product is not cut.)
template <typename T>
void grams(const std::vector<Gram<T>>& jobs);

}  // namespace kdk
