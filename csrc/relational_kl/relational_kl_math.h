// SPDX-License-Identifier: Apache-2.0
// The CPU and CUDA kernels share this arithmetic of relational_kl, on scalars or on GCC vectors of
// them. docs/ops/relational_kl.md derives it.
#pragma once

#include "../common/softmax_sums.h"

namespace kdk::relational_kl {

// Returns the factor of p in the loss, from two logarithms less the same constants as in the sums.
template <typename V>
KDK_HOST_DEVICE V cost(V log_p, V log_q, bool subtract_entropy) {
  return subtract_entropy ? log_p - log_q : -log_q;
}

// Returns the derivative of a row's loss by a logit of the teacher. The derivative by a logit of
// the student is q - p.
template <typename V, typename T>
KDK_HOST_DEVICE V by_teacher_logit(V p, V c, T loss) {
  return p * (c - loss);
}

template <typename T>
struct RowResult {
  T loss, lse_student, lse_teacher;
};

// Returns the result of a row with a teacher, from its sums over all keys. A row that no key is
// left for has a loss of 0.
template <typename T>
KDK_HOST_DEVICE RowResult<T> row_result(const SoftmaxSums<T>& sums, bool subtract_entropy,
                                        bool no_key) {
  if (no_key) return {};
  const T log_student = std::log(sums.student.sum), log_teacher = std::log(sums.teacher.sum);
  const T of_entropy = subtract_entropy ? log_teacher : T(0);
  return {sums.mean / sums.teacher.sum + log_student - of_entropy, sums.student.max + log_student,
          sums.teacher.max + log_teacher};
}

// Returns the result of a row without a teacher, from the logit of its positive key, or from 0
// where it has none: its loss is the log-sum-exp then.
template <typename T>
KDK_HOST_DEVICE RowResult<T> row_result(const SoftmaxSum<T>& student, T positive, bool no_key) {
  if (no_key) return {};
  const T log_student = std::log(student.sum);
  return {student.max - positive + log_student, student.max + log_student, T(0)};
}

}  // namespace kdk::relational_kl
