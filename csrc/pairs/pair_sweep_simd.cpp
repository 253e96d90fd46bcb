// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
#include "pair_sweep_simd.h"

#include <type_traits>

#include "../common/host_device.h"
#include "../common/rows_math.h"
#include "../common/transpose.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::pairs::KDK_SIMD_LEVEL {
namespace {

KDK_HOST_DEVICE float root(float x) { return __builtin_sqrtf(x); }
KDK_HOST_DEVICE double root(double x) { return __builtin_sqrt(x); }

// The type of the norms is W.
template <typename T, typename W, Distance kDistance>
int64_t distances_of(T* d, W norm, const W* norms, int64_t n) {
  Count<T> close = 0;
#pragma omp simd reduction(+ : close)
  for (int64_t j = 0; j < n; ++j) {
    const W wide_size = norm + norms[j];
    const T size = static_cast<T>(wide_size), d2 = static_cast<T>(wide_size - W(2) * d[j]);
    const bool near = d2 <= kClose<T> * size;  // false for NaN, which stays
    const T value = kDistance == Distance::kEuclidean     ? root(d2)
                    : kDistance == Distance::kSqEuclidean ? d2
                                                          : d2 / 2;
    close += near;
    d[j] = near ? T(-1) : value;
  }
  return close;
}

template <typename T, typename W>
int64_t distances(T* d, W norm, const W* norms, int64_t n, Distance distance) {
  const auto run = distance == Distance::kEuclidean     ? distances_of<T, W, Distance::kEuclidean>
                   : distance == Distance::kSqEuclidean ? distances_of<T, W, Distance::kSqEuclidean>
                                                        : distances_of<T, W, Distance::kCosine>;
  return run(d, norm, norms, n);
}

template <typename T, Distance kDistance>
double slopes_of(const T* d, T* weight, double* column_sums, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T inverse = T(1) / d[j];
    const T slope = kDistance == Distance::kEuclidean     ? (d[j] > T(0) ? inverse : T(0))
                    : kDistance == Distance::kSqEuclidean ? T(2)
                                                          : T(1);
    const T value = weight[j] * slope;
    weight[j] = value;
    sum += static_cast<double>(value);
    column_sums[j] += static_cast<double>(value);
  }
  return sum;
}

template <typename T>
double slopes(const T* d, T* weight, double* column_sums, int64_t n, Distance distance) {
  const auto run = distance == Distance::kEuclidean     ? slopes_of<T, Distance::kEuclidean>
                   : distance == Distance::kSqEuclidean ? slopes_of<T, Distance::kSqEuclidean>
                                                        : slopes_of<T, Distance::kCosine>;
  return run(d, weight, column_sums, n);
}

template <typename T>
void finish(double factor, const T* x, const double* sum, T* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    out[j] = static_cast<T>(factor * static_cast<double>(x[j]) - sum[j]);
}

template <typename T>
void subtract_difference(double factor, const T* x, const T* y, double* sum, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    sum[j] -= factor * (static_cast<double>(x[j]) - static_cast<double>(y[j]));
}

template <typename T>
T least_above(const T* d, T sign, T floor, const T* column_floors, T* column_keys, int64_t n) {
  constexpr T kInfinity = static_cast<T>(__builtin_inf());
  T least = kInfinity;
  if (column_keys == nullptr) {
#pragma omp simd reduction(min : least)
    for (int64_t j = 0; j < n; ++j) {
      const T key = sign * d[j], here = key > floor ? key : kInfinity;
      least = here < least ? here : least;
    }
    return least;
  }
#pragma omp simd reduction(min : least)
  for (int64_t j = 0; j < n; ++j) {
    const T key = sign * d[j];
    const T here = key > floor ? key : kInfinity, there = key > column_floors[j] ? key : kInfinity;
    least = here < least ? here : least;
    column_keys[j] = there < column_keys[j] ? there : column_keys[j];
  }
  return least;
}

template <typename T>
bool any_key_within(const T* d, T sign, T low, T high, int64_t n) {
  Count<T> found = 0;
#pragma omp simd reduction(+ : found)
  for (int64_t j = 0; j < n; ++j) {
    const T key = sign * d[j];
    found += (key > low) & (key <= high);
  }
  return found > 0;
}

template <typename T, bool kAdd>
void transposed(Matrix<const T> from, Matrix<T> to) {
  const auto entries = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t i = i0; i < i1; ++i) {
      for (int64_t j = j0; j < j1; ++j)
        to.row(j)[i] = kAdd ? to.row(j)[i] + from.row(i)[j] : from.row(i)[j];
    }
  };
  int64_t i = 0;
  for (; i + 4 <= from.rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= from.cols; j += 4) {
      if constexpr (std::is_same_v<T, float>) {
        FloatRow rows[4], columns[4];
        for (int n = 0; n < 4; ++n)
          rows[n] = *reinterpret_cast<const FloatRow*>(from.row(i + n) + j);
        transpose(rows, columns);
        for (int n = 0; n < 4; ++n) {
          // auto would drop the alignment of 4 bytes
          FloatRow* out = reinterpret_cast<FloatRow*>(to.row(j + n) + i);
          *out = kAdd ? *out + columns[n] : columns[n];
        }
      } else {
        entries(i, i + 4, j, j + 4);
      }
    }
    entries(i, i + 4, j, from.cols);
  }
  entries(i, from.rows, 0, from.cols);
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {
      distances<T, T>,   distances<T, double>,   slopes<T>,
      finish<T>,         subtract_difference<T>, least_above<T>,
      any_key_within<T>, transposed<T, false>,   transposed<T, true>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::pairs::KDK_SIMD_LEVEL
