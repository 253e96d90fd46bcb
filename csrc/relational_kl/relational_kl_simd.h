// SPDX-License-Identifier: Apache-2.0
// These are the vectorised epilogues of relational_kl on the CPU. Each instruction set has one
// table of them. Each function takes a stretch of n keys of one row. `factors` is [n], or null
// where all factors are 1.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::relational_kl {

// The sums of both sides' weights exp(logit - maximum), and as `mean` the sum of the teacher's
// weights times c = subtract_entropy (b - max_b) - (a - max_a).
struct Sums {
  double student, teacher, mean;
};

// What the derivatives of one row's loss by its logits depend on.
template <typename T>
struct Row {
  T lse_student, lse_teacher, loss, dout;
  bool subtract_entropy;
};

template <typename T>
struct Epilogues {
  // a *= factors. Returns the maximum, which ignores NaN.
  T (*maximum)(T* a, const T* factors, int64_t n);
  // a = exp(a - max) factors. Returns the sum of the exponentials.
  double (*weights)(T* a, const T* factors, int64_t n, T max);
  // does the same for both sides
  Sums (*both_weights)(T* a, T* b, const T* factors, int64_t n, T max_a, T max_b,
                       bool subtract_entropy);
  // a = dout softmax(a)
  void (*softmax)(T* a, int64_t n, T lse, T dout);
  // a and b become dout times the derivatives of the loss by them
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
