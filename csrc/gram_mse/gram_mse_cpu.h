// SPDX-License-Identifier: Apache-2.0
// The three algorithms of gram_mse work on one group of rows. T is the type of the features and of
// the gradient. F is the type of the Grams or factors that the forward keeps: T, but fp64 for the
// factors of fp32 features. The residuals are described in kdkernels/ops/gram_mse.py.
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

template <typename T, typename F = T>
struct Forward {
  // [B, D_s], [B, D_t]; for kFeature unit rows, unless F is wider than T
  Matrix<const T> student, teacher;
  T* loss;              // [1]
  Matrix<double> coef;  // [kCoefs, B]
  Matrix<F> gram_student, gram_teacher, cross;
};

// The arguments for the gradient of one side, which is called `side`. For the teacher's gradient
// the two sides are swapped and `cross` is transposed.
template <typename T, typename F = T>
struct Backward {
  Matrix<const T> side, other;            // [B, D_side], [B, D_other], as in Forward
  Matrix<const F> gram_side, gram_other;  // empty for kStreamed
  Matrix<const F> cross;                  // kFactored: [D_other, D_side]
  const double *a, *b, *c, *b_other;      // [B] each, times dout
  T dout;
  Matrix<T> gradient;  // [B, D_side], with respect to `side`
};

template <typename T>
void tiled_forward(const Forward<T>& call, const Options& options);

template <typename T>
void tiled_backward(const Backward<T>& call, const Options& options);

template <typename T, typename F>
void factored_forward(const Forward<T, F>& call, const Options& options);

template <typename T, typename F>
void factored_backward(const Backward<T, F>& call, const Options& options);

// Computes the coefficients of all rows from their sums [B, kSums], and returns the loss.
double finish_rows(Matrix<double> coef, const double* sums, bool l2);

void uniform_coef(Matrix<double> coef);

}  // namespace kdk::gram_mse
