// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
#include "rkd_simd.h"

#include "rkd_math.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::rkd::KDK_SIMD_LEVEL {
namespace {

template <typename T>
double sum(const T* d, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += static_cast<double>(d[j]);
  return total;
}

template <typename T>
void compare(const Compared<T>& pairs, double* loss, double* shared) {
  const auto [s, t, n, inverse_s, inverse_t] = pairs;
  double losses = 0, products = 0;
#pragma omp simd reduction(+ : losses, products)
  for (int64_t j = 0; j < n; ++j) {
    const T h = s[j] * inverse_s, e = h - t[j] * inverse_t, g = huber_slope(e);
    losses += static_cast<double>(huber(e, g));
    products += static_cast<double>(g * h);
  }
  *loss += losses;
  *shared += products;
}

template <typename T>
void weigh(const Compared<T>& pairs, T shared, T factor, T* weight) {
  const auto [s, t, n, inverse_s, inverse_t] = pairs;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    weight[j] = factor * (huber_slope(s[j] * inverse_s - t[j] * inverse_t) - shared);
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {sum<T>, compare<T>, weigh<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::rkd::KDK_SIMD_LEVEL
