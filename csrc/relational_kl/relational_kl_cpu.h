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
  const int64_t* positives;            // [B] or null, where there is no teacher
  const int64_t* exclude;              // [B] or null
  const bool* mask;                    // [B, mask_stride] or null: true where a key does not count
  int64_t mask_stride;                 // at least as many as there are keys
  const T *own_student, *own_teacher;  // [B] or null: one more logit per row and side
  bool subtract_entropy;

  int64_t rows() const { return student.rows.rows; }
  int64_t keys() const { return student.keys.rows; }
  // Returns whether the positive that row i names is no key, which makes the row NaN.
  bool names_no_key(int64_t i) const {
    return positives && (positives[i] < 0 || positives[i] >= keys());
  }
  // Returns the mask of row i from key k0 on, or null.
  const bool* masked(int64_t i, int64_t k0) const {
    return mask ? mask + i * mask_stride + k0 : nullptr;
  }
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
