// SPDX-License-Identifier: Apache-2.0
// The three algorithms of gram_mse work on one group of rows, in fp32 or fp64. The residuals are
// described in kdkernels/ops/gram_mse.py.
#pragma once

#include <cstdint>

#include "../common/matrix.h"
#include "../common/stable.h"
#include "gram_mse_math.h"

namespace kdk::gram_mse {

struct Options {
  Normalize normalize;
  bool taylor;
  double gamma;
  int order;
  Algorithm algorithm;
};

template <typename T>
struct Forward {
  Matrix<const T> student, teacher;  // [B, D_s], [B, D_t]; unit rows for kFeature
  T* loss;                           // [1]
  Matrix<double> coef;               // [kCoefs, B]
  Matrix<T> gram_student, gram_teacher, cross;
};

// The arguments for the gradient of one side, which is called `side`. For the teacher's gradient
// the two sides are swapped and `cross` is transposed.
template <typename T>
struct Backward {
  Matrix<const T> side, other;            // [B, D_side], [B, D_other]; unit rows for kFeature
  Matrix<const T> gram_side, gram_other;  // empty for kStreamed
  Matrix<const T> cross;                  // kFactored: [D_other, D_side]
  const double *a, *b, *c;                // [B] each, times dout
  T dout;
  Matrix<T> gradient;  // [B, D_side], with respect to `side`
};

template <typename T>
void forward(const Forward<T>& call, const Options& options);

template <typename T>
void backward(const Backward<T>& call, const Options& options);

template <typename T>
void factored_forward(const Forward<T>& call, const Options& options);

template <typename T>
void factored_backward(const Backward<T>& call, const Options& options);

// Computes the losses and coefficients of all rows from their sums [B, kSums].
template <typename T>
void finish_rows(const Forward<T>& call, const double* sums, bool l2);

void uniform_coef(Matrix<double> coef);

}  // namespace kdk::gram_mse
