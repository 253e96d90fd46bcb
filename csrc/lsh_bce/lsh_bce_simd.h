// SPDX-License-Identifier: Apache-2.0
// The vectorised epilogues of lsh_bce on the CPU, one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::lsh_bce {

template <typename T>
struct Epilogues {
  // Sum of the cross-entropies of n projections z + bias against bits, from the first of `codes`
  // on. If `gradient`, z becomes factor times their derivatives.
  double (*cross_entropy)(T* z, const T* bias, const uint8_t* codes, int64_t n, bool gradient,
                          T factor);
  // codes = bits of z + bias > 0, the bits beyond n in the last byte 0
  void (*pack)(const T* z, const T* bias, int64_t n, uint8_t* codes);
};

KDK_SIMD_DECLARE(template <typename T> const Epilogues<T>& epilogues();)

template <typename T>
const Epilogues<T>& epilogues() {
  return KDK_SIMD_CALL(epilogues<T>)();
}

}  // namespace kdk::lsh_bce
