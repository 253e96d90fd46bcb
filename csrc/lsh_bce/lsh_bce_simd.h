// SPDX-License-Identifier: Apache-2.0
// These are the vectorised epilogues of lsh_bce on the CPU. Each instruction set has one table of
// them.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::lsh_bce {

template <typename T>
struct Epilogues {
  // Returns the sum of the cross-entropies of n projections z + bias and their bits, from the first
  // of `codes` on. If `gradient`, z becomes factor times their derivatives.
  double (*cross_entropy)(T* z, const T* bias, const uint8_t* codes, int64_t n, bool gradient,
                          T factor);
  // codes = bits of z + bias > 0. In the last byte the bits beyond n are 0.
  void (*pack)(const T* z, const T* bias, int64_t n, uint8_t* codes);
};

KDK_SIMD_DECLARE(template <typename T> const Epilogues<T>& epilogues();)

template <typename T>
const Epilogues<T>& epilogues() {
  return KDK_SIMD_CALL(epilogues<T>)();
}

}  // namespace kdk::lsh_bce
