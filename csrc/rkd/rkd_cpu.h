// SPDX-License-Identifier: Apache-2.0
// Each loss of rkd gives its value, and its derivative by the student's features. Both losses are
// even in the difference of the sides, so the derivative by the teacher is that by the student of a
// call with the sides exchanged.
#pragma once

#include "../common/stable.h"

namespace kdk::rkd {

struct Result {
  double loss;
  Tensor gradient;  // [B, D_s]; [0] unless needed
};

// student: [B, D_s], teacher: [B, D_t], both contiguous and in T; the gradient is in T.
template <typename T>
Result distance(const Tensor& student, const Tensor& teacher, bool need);

// student: [B, D_s], teacher: [B, D_t], both contiguous and in fp64; the gradient is in fp64. T is
// the type of the features as they were given, whose digits suffice for most angles.
template <typename T>
Result angle(const Tensor& student, const Tensor& teacher, bool need);

}  // namespace kdk::rkd
