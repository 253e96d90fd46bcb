// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see simd.h).
#include "rows_simd.h"

#include "rows_math.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::rows::KDK_SIMD_LEVEL {
namespace {

template <typename T>
double dot(const T* x, const T* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(y[j]);
  return sum;
}

template <typename T>
double squared_difference(const T* x, const T* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const double e = static_cast<double>(x[j]) - static_cast<double>(y[j]);
    sum += e * e;
  }
  return sum;
}

template <typename T>
double add_offsets(const T* x, const T* origin, double* sums, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const double e = static_cast<double>(x[j]) - static_cast<double>(origin[j]);
    sums[j] += e;
    sum += e * e;
  }
  return sum;
}

template <typename T>
void subtract(T* x, const T* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] -= y[j];
}

template <typename T>
void scale(const T* x, T factor, T* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = factor * x[j];
}

template <typename T>
void widen(const T* x, double factor, double* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = factor * static_cast<double>(x[j]);
}

template <typename T>
void narrow(const double* x, T* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = static_cast<T>(x[j]);
}

template <typename T, typename Sum>
void add(const T* x, Sum* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] += static_cast<Sum>(x[j]);
}

template <typename T>
void normalize(const T* x, T* u, int64_t n) {
  const double norm = no_infinity(__builtin_sqrt(dot(x, x, n)));
  const T inverse = static_cast<T>(1 / clamp_min(norm, kEps));
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) u[j] = inverse * x[j];
}

// In fp64: the radial part that is taken away can be much larger than what remains.
template <typename T>
void normalize_backward(const T* x, T* dx, int64_t n) {
  const double norm = no_infinity(__builtin_sqrt(dot(x, x, n)));
  const double inverse = 1 / clamp_min(norm, kEps);
  const double radial = norm >= kEps ? dot(x, dx, n) * inverse * inverse : 0;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    dx[j] =
        static_cast<T>((static_cast<double>(dx[j]) - radial * static_cast<double>(x[j])) * inverse);
  }
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {dot<T>,
                                     squared_difference<T>,
                                     add_offsets<T>,
                                     subtract<T>,
                                     scale<T>,
                                     widen<T>,
                                     narrow<T>,
                                     add<T, T>,
                                     add<T, double>,
                                     normalize<T>,
                                     normalize_backward<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::rows::KDK_SIMD_LEVEL
