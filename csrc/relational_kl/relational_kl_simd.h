// SPDX-License-Identifier: Apache-2.0
// The vectorised epilogues of relational_kl on the CPU, one table of functions per instruction set.
// Each takes a stretch of n keys of one row; factors [n] or null for 1.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::relational_kl {

// Of weights exp(logit - maximum): their sums, and the sum of the teacher's times c, where
// c = subtract_entropy (b - max_b) - (a - max_a).
struct Sums {
  double student, teacher, mean;
};

// What one row's derivatives depend on.
template <typename T>
struct Row {
  T lse_student, lse_teacher, loss, dout;
  bool subtract_entropy;
};

template <typename T>
struct Epilogues {
  // a *= factors; returns the maximum, which passes over NaN
  T (*maximum)(T* a, const T* factors, int64_t n);
  // a = exp(a - max) factors; returns the sum of the exponentials
  double (*weights)(T* a, const T* factors, int64_t n, T max);
  // the same of both sides
  Sums (*both_weights)(T* a, T* b, const T* factors, int64_t n, T max_a, T max_b,
                       bool subtract_entropy);
  // a = dout softmax(a)
  void (*softmax)(T* a, int64_t n, T lse, T dout);
  // a and b become dout times the derivatives by them
  void (*derivatives)(T* a, T* b, int64_t n, const Row<T>& row);
  // x *= factors
  void (*multiply)(T* x, const T* factors, int64_t n);
  // y += factor x
  void (*add_scaled)(const T* x, T factor, T* y, int64_t n);
};

KDK_SIMD_DECLARE(template <typename T> const Epilogues<T>& epilogues();)

template <typename T>
const Epilogues<T>& epilogues() {
  return KDK_SIMD_CALL(epilogues<T>)();
}

}  // namespace kdk::relational_kl
