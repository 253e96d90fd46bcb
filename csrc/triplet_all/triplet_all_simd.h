// SPDX-License-Identifier: Apache-2.0
// These are the vectorised loops of triplet_all on the CPU. Each instruction set has one table of
// them.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::triplet_all {

inline constexpr int64_t kStretch = 256;  // most negatives that one call takes

// A function of this type compares d_j - margin with the distances to the positives, the descending
// `thresholds`, for n <= kStretch:
//   weight_j  becomes the derivative of the anchor's loss by d_j
//   slots     one per threshold, see below
//   sum       see below
// It returns the number of losses above 0, or of negatives with such a loss. Where that number is
// 0, all results are 0.
template <typename T>
using Weigh = int64_t (*)(const T* d, T margin, int64_t n, const T* thresholds, int64_t P,
                          T* weight, double* slots, double* sum);

template <typename T>
struct Loops {
  // Hinge. *sum += each d_j - margin times the number of thresholds above it. With few thresholds
  // slots_p += number of negatives below threshold p; with many, slots_p += number of negatives
  // with exactly p + 1 thresholds above them.
  Weigh<T> few, many;
  // Softplus. *sum += the losses, slots_p += their derivatives by threshold p.
  Weigh<T> soft;
  // at_j = number of thresholds that are not below d_j
  void (*not_below)(const T* d, int64_t n, const T* thresholds, int64_t P, int32_t* at);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::triplet_all
