// SPDX-License-Identifier: Apache-2.0
// Softmaxes are summed part by part: each sum is relative to a maximum that grows, and sums of
// parts are merged. The CPU and CUDA kernels share this arithmetic; T is double or float.
#pragma once

#include <cmath>

#include "host_device.h"

namespace kdk {

KDK_HOST_DEVICE double softmax_exp(double x) { return std::exp(x); }

// On a GPU ex2.approx, within 2 + 1.2 |x| units in the last place: what rounding x costs, and a
// little.
KDK_HOST_DEVICE float softmax_exp(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}

// The sum of exp(a - max) over some logits a, of which max is the largest. A logit that is NaN is
// never the maximum, but makes the sum NaN.
template <typename T>
struct SoftmaxSum {
  T max = -static_cast<T>(__builtin_huge_val()), sum = 0;

  // Returns what the sum has to be multiplied by to be relative to `most`; 0 if there is no logit.
  KDK_HOST_DEVICE T factor(T most) const {
    return sum == 0 ? T(0) : max == most ? T(1) : softmax_exp(max - most);
  }

  // Makes the sum relative to `most`, which is at least as large as the maximum.
  KDK_HOST_DEVICE void raise(T most) {
    sum *= factor(most);
    max = most;
  }
};

// The sums of both sides, and as `mean` the sum of the teacher's exp(b - max_b) times
//   c = subtract_entropy (b - max_b) - (a - max_a),
// which cancels nothing, as sums of b - a would.
template <typename T>
struct SoftmaxSums {
  SoftmaxSum<T> student, teacher;
  T mean = 0;

  // Makes the sums relative to these maxima, which are at least as large as the present ones.
  KDK_HOST_DEVICE void raise(T most_student, T most_teacher, bool subtract_entropy) {
    if (teacher.sum != 0) {
      const T by_teacher = teacher.max == most_teacher ? T(0) : teacher.max - most_teacher;
      const T by_student = student.max == most_student ? T(0) : student.max - most_student;
      const T shift = (subtract_entropy ? by_teacher : T(0)) - by_student;
      mean = teacher.factor(most_teacher) * (mean + shift * teacher.sum);
    }
    student.raise(most_student);
    teacher.raise(most_teacher);
  }

  // Adds the sums over another part.
  KDK_HOST_DEVICE void add(SoftmaxSums other, bool subtract_entropy) {
    const T most_student = student.max < other.student.max ? other.student.max : student.max;
    const T most_teacher = teacher.max < other.teacher.max ? other.teacher.max : teacher.max;
    raise(most_student, most_teacher, subtract_entropy);
    other.raise(most_student, most_teacher, subtract_entropy);
    student.sum += other.student.sum;
    teacher.sum += other.teacher.sum;
    mean += other.mean;
  }
};

}  // namespace kdk
