// SPDX-License-Identifier: Apache-2.0
// Operators that divide rows by their norms take the rows as they are given, and return the
// gradient of those.
#pragma once

#include <cmath>
#include <limits>

#include "parallel.h"
#include "rows_math.h"
#include "rows_simd.h"
#include "stable.h"

namespace kdk {

// Returns the norm of a row as the accumulation dtype has it: NaN where its square overflows there.
template <typename T>
double norm_in(const T* x, int64_t n) {
  const double squared = rows::loops<T>().dot(x, x, n);
  return squared <= static_cast<double>(std::numeric_limits<T>::max())
             ? std::sqrt(squared)
             : std::numeric_limits<double>::quiet_NaN();
}

// Returns rows divided by their norms, clamped at kEps. x: [n, D], contiguous in T.
template <typename T>
Tensor unit_rows(const Tensor& x) {
  const int64_t n = x.size(0), D = x.size(1);
  const Tensor result = empty({n, D}, scalar_type_of<T>);
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  auto* to = static_cast<T*>(result.mutable_data_ptr());
  parallel_each(n, 3.0 * D, [&](int64_t i) {
    const double norm = norm_in(from + i * D, D);
    rows::loops<T>().scale(from + i * D, static_cast<T>(1 / clamp_min(norm, kEps)), to + i * D, D);
  });
  return result;
}

// Turns the gradient of unit_rows(x) into that of x, in place; [0] stays. Both are contiguous in T.
template <typename T>
void unit_rows_gradient(const Tensor& x, const Tensor& dx) {
  if (dx.dim() != 2) return;
  const int64_t n = x.size(0), D = x.size(1);
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  auto* to = static_cast<T*>(dx.mutable_data_ptr());
  parallel_each(n, 6.0 * D, [&](int64_t i) {
    if (std::isnan(norm_in(from + i * D, D))) {
      std::fill_n(to + i * D, D, std::numeric_limits<T>::quiet_NaN());
    } else {
      rows::loops<T>().normalize_backward(from + i * D, to + i * D, D);
    }
  });
}

}  // namespace kdk
