// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
#include "pairwise_simd.h"

#include "../common/lanes.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::pairwise::KDK_SIMD_LEVEL {
namespace {

using namespace kdk::KDK_SIMD_LEVEL;

template <typename T>
int64_t mark_sharp(T* d2, T norm, const T* norms, T gamma, int64_t n) {
  Count<T> sharp = 0;
#pragma omp simd reduction(+ : sharp)
  for (int64_t j = 0; j < n; ++j) {
    const bool marked = is_sharp(d2[j], norm + norms[j], gamma);
    d2[j] = marked ? T(-1) : d2[j];
    sharp += marked;
  }
  return sharp;
}

template <typename T, bool kFull>
void rbf_of(T* d2, T gamma, int64_t count) {
  store<kFull>(d2, exp_of_negative<T>(-gamma * load<kFull>(d2, count)), count);
}

template <typename T>
void rbf(T* d2, T gamma, int64_t n) {
  constexpr int64_t kLanes = kCount<T>;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) rbf_of<T, true>(d2 + j, gamma, kLanes);
  if (j < n) rbf_of<T, false>(d2 + j, gamma, n - j);
}

template <Metric kMetric, typename T>
int64_t close_of(const T* value, T bound, const T* bounds, int64_t n) {
  Count<T> close = 0;
#pragma omp simd reduction(+ : close)
  for (int64_t j = 0; j < n; ++j) close += is_close<kMetric>(value[j], bound, bounds[j]);
  return close;
}

template <typename T>
int64_t close(const T* value, T bound, const T* bounds, Metric metric, int64_t n) {
  const auto run = metric == Metric::kEuclidean     ? close_of<Metric::kEuclidean, T>
                   : metric == Metric::kSqEuclidean ? close_of<Metric::kSqEuclidean, T>
                                                    : close_of<Metric::kRbf, T>;
  return run(value, bound, bounds, n);
}

template <Metric kMetric, typename T>
double slopes_of(const T* value, T* weight, T factor, int64_t n, double* column_sums) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    // a slope may be infinite where the weight is 0
    const T w = weight[j] == T(0) ? T(0) : weight[j] * slope<kMetric>(value[j], factor);
    weight[j] = w;
    sum += static_cast<double>(w);
    column_sums[j] += static_cast<double>(w);
  }
  return sum;
}

template <typename T>
double slopes(const T* value, T* weight, Metric metric, T factor, int64_t n, double* column_sums) {
  const auto run = metric == Metric::kEuclidean     ? slopes_of<Metric::kEuclidean, T>
                   : metric == Metric::kSqEuclidean ? slopes_of<Metric::kSqEuclidean, T>
                                                    : slopes_of<Metric::kRbf, T>;
  return run(value, weight, factor, n, column_sums);
}

template <typename T>
void finish(double factor, const T* x, T* sum, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    sum[j] = static_cast<T>(factor * static_cast<double>(x[j]) - static_cast<double>(sum[j]));
}

template <typename T>
void subtract_difference(double factor, const T* x, const T* y, T* sum, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    sum[j] -= static_cast<T>(factor * (static_cast<double>(x[j]) - static_cast<double>(y[j])));
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {mark_sharp<T>, rbf<T>,    close<T>,
                                     slopes<T>,     finish<T>, subtract_difference<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::pairwise::KDK_SIMD_LEVEL
