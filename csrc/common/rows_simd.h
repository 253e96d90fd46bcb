// SPDX-License-Identifier: Apache-2.0
// These are vectorised loops over one or two rows. Each instruction set has one table of them.
#pragma once

#include <cstdint>

#include "simd.h"

namespace kdk::rows {

template <typename T>
struct Loops {
  // returns the sum of x y
  double (*dot)(const T* x, const T* y, int64_t n);
  // returns the sum of (x - y)^2
  double (*squared_difference)(const T* x, const T* y, int64_t n);
  // sums += x - origin. Returns the sum of (x - origin)^2.
  double (*add_offsets)(const T* x, const T* origin, double* sums, int64_t n);
  // x -= y
  void (*subtract)(T* x, const T* y, int64_t n);
  // y = factor x
  void (*scale)(const T* x, T factor, T* y, int64_t n);
  // y = factor x, in fp64
  void (*widen)(const T* x, double factor, double* y, int64_t n);
  // y = x, rounded
  void (*narrow)(const double* x, T* y, int64_t n);
  // y += x
  void (*add)(const T* x, T* y, int64_t n);
  // sums += x
  void (*add_wide)(const T* x, double* sums, int64_t n);
  // u = x / max(|x|, kEps)
  void (*normalize)(const T* x, T* u, int64_t n);
  // dx = (dx - <dx, u> u) / norm with u = x / norm, where norm = max(|x|, kEps); without the middle
  // term below kEps
  void (*normalize_backward)(const T* x, T* dx, int64_t n);
};

KDK_SIMD_DECLARE(template <typename T> const Loops<T>& loops();)

template <typename T>
const Loops<T>& loops() {
  return KDK_SIMD_CALL(loops<T>)();
}

}  // namespace kdk::rows
