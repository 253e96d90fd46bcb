// SPDX-License-Identifier: Apache-2.0
// These are the vectorised loops of triplet on the CPU. Each instruction set has one table of them.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::triplet {

template <typename T>
struct Loops {
  // Products d_j = <x, y_j> become squared distances norm + norms_j - 2 d_j, at least 0.
  void (*squared_distances)(T* d, T norm, const T* norms, int64_t n);
  // out += factor (x - y)
  void (*add_difference)(T factor, const T* x, const T* y, T* out, int64_t n);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::triplet
