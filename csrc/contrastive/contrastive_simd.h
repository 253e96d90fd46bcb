// SPDX-License-Identifier: Apache-2.0
// These are the vectorised loops of contrastive on the CPU. Each instruction set has one table of
// them.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::contrastive {

template <typename T>
struct Loops {
  // Adds the losses of n pairs of one label (same_label) or of different ones to *total; weight_j
  // becomes the derivative by d_j. Returns how many losses are above 0.
  int64_t (*losses)(const T* d, T margin, bool same_label, int64_t n, T* weight, double* total);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::contrastive
