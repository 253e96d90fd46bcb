// SPDX-License-Identifier: Apache-2.0
// These are the vectorised loops of rkd_distance on the CPU. Each instruction set has one table of
// them.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::rkd {

// The distances of n pairs on both sides, and the factors that bring them to a mean of 1.
template <typename T>
struct Compared {
  const T *student, *teacher;
  int64_t n;
  T inverse_student, inverse_teacher;  // 1 / mean distance
};

template <typename T>
struct Loops {
  double (*sum)(const T* d, int64_t n);
  // With h the distances over their means, e the difference of the sides' and g the derivative of
  // huber(e): adds huber(e) to *loss and g h_student to *shared.
  void (*compare)(const Compared<T>& pairs, double* loss, double* shared);
  // weight = factor (g - shared)
  void (*weigh)(const Compared<T>& pairs, T shared, T factor, T* weight);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::rkd
