// SPDX-License-Identifier: Apache-2.0
// relational_kl sweeps over tiles of logits, in fp32 or fp64. The residuals are described in
// kdkernels/ops/relational_kl.py.
#pragma once

#include <cstdint>

#include "../common/matrix.h"

namespace kdk::relational_kl {

// The rows and keys of one side, whose logits are rows (scale keys)^T.
template <typename T>
struct Side {
  Matrix<const T> rows;  // [B, D]
  Matrix<const T> keys;  // [K, D]
  const T* scale;        // [K], or null for 1
};

template <typename T>
struct Problem {
  Side<T> student, teacher;
  bool has_teacher;
  bool shared;                         // both sides have the same keys
  const int64_t* positives;            // [B], where there is no teacher
  const int64_t* exclude;              // [B] or null
  const T *own_student, *own_teacher;  // [B] or null: one more logit per row and side
  bool subtract_entropy;

  int64_t rows() const { return student.rows.rows; }
  int64_t keys() const { return student.keys.rows; }
  // Whether row i names a key in the teacher's place; one that does not makes its row NaN.
  bool has_positive(int64_t i) const { return positives[i] >= 0 && positives[i] < keys(); }
};

template <typename T>
struct Residuals {
  T *loss, *lse_student, *lse_teacher;  // [B]
};

// Computes the residuals and, unless `gradient` is null, the derivative [B, D] of the losses by the
// student.
template <typename T>
void forward(const Problem<T>& problem, const Residuals<T>& residuals, const Matrix<T>* gradient);

// The gradients of the losses times dout [B], each unless null: by the teacher [B, E], by the
// scaled keys [K, D], by the scaled teacher keys [K, E]. The backward does not need own logits: the
// residuals hold them.
template <typename T>
struct Gradients {
  const Matrix<T>*teacher, *keys, *teacher_keys;
};

template <typename T>
void backward(const Problem<T>& problem, const Residuals<const T>& residuals, const T* dout,
              int64_t dout_stride, const Gradients<T>& gradients);

}  // namespace kdk::relational_kl
