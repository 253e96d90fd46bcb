// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h). Sums are kept in fp64: the
// loss is a difference of row sums that nearly cancel as the student approaches the teacher, and
// next to a product of depth D they cost nothing.
#include "gram_mse_simd.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::gram_mse::KDK_SIMD_LEVEL {
namespace {

template <typename T, bool kL1, bool kCols>
void row_sums_of(Matrix<const T> side, Matrix<const T> other, double* rows, double* cols) {
  const int64_t n = side.cols;
  const int64_t step = kCols ? n : 0;
  double *c0 = cols, *c1 = c0 + step, *c2 = c1 + step, *c3 = c2 + step, *c4 = c3 + step;
  for (int64_t i = 0; i < side.rows; ++i) {
    const T *a = side.row(i), *k = other.row(i);
    double r0 = 0, r1 = 0, r2 = 0, r3 = 0, r4 = 0;
#pragma omp simd reduction(+ : r0, r1, r2, r3, r4)
    for (int64_t j = 0; j < n; ++j) {
      const double s = a[j], t = k[j];
      const double ss = s * s, tt = t * t, st = s * t;
      r0 += ss;
      r1 += tt;
      r2 += st;
      if constexpr (kCols) {
        c0[j] += ss;
        c1[j] += tt;
        c2[j] += st;
      }
      if constexpr (kL1) {
        const double as = s < 0 ? -s : s, at = t < 0 ? -t : t;
        r3 += as;
        r4 += at;
        if constexpr (kCols) {
          c3[j] += as;
          c4[j] += at;
        }
      }
    }
    double* out = rows + i * kSums;
    out[0] += r0;
    out[1] += r1;
    out[2] += r2;
    out[3] += r3;
    out[4] += r4;
  }
}

template <typename T>
void row_sums(Matrix<const T> side, Matrix<const T> other, bool l1, double* rows, double* cols) {
  if (l1) {
    cols ? row_sums_of<T, true, true>(side, other, rows, cols)
         : row_sums_of<T, true, false>(side, other, rows, cols);
  } else {
    cols ? row_sums_of<T, false, true>(side, other, rows, cols)
         : row_sums_of<T, false, false>(side, other, rows, cols);
  }
}

template <typename T>
double squared_difference(Matrix<const T> side, Matrix<const T> other, const Taylor<T>* f) {
  double sum = 0;
  for (int64_t i = 0; i < side.rows; ++i) {
    const T *a = side.row(i), *k = other.row(i);
    if (f == nullptr) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < side.cols; ++j) {
        const double e = a[j] - k[j];
        sum += e * e;
      }
    } else {
      const Taylor<T> g = *f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < side.cols; ++j) {
        const double e = g.value(a[j]) - g.value(k[j]);
        sum += e * e;
      }
    }
  }
  return sum;
}

template <typename T>
void linear_weights(Matrix<const T> side, Matrix<const T> other, const double* a_i,
                    const double* b_i, const double* c_i, const double* a_j, const double* b_j,
                    const double* c_j, Matrix<T> weights) {
  for (int64_t i = 0; i < side.rows; ++i) {
    const T *x = side.row(i), *y = other.row(i);
    T* w = weights.row(i);
    const double a = a_i[i], b = b_i[i], c = c_i[i];
#pragma omp simd
    for (int64_t j = 0; j < side.cols; ++j) {
      const double s = x[j], t = y[j];
      w[j] = static_cast<T>(linear_weight(s, t, a, a_j[j], b, b_j[j], c, c_j[j]));
    }
  }
}

template <typename T>
void taylor_weights(Matrix<const T> side, Matrix<const T> other, const Taylor<T>& f, T factor,
                    Matrix<T> weights) {
  const Taylor<T> g = f;
  for (int64_t i = 0; i < side.rows; ++i) {
    const T *x = side.row(i), *y = other.row(i);
    T* w = weights.row(i);
#pragma omp simd
    for (int64_t j = 0; j < side.cols; ++j) w[j] = factor * taylor_weight(x[j], y[j], g);
  }
}

}  // namespace

template <typename T>
const Epilogues<T>& epilogues() {
  static constexpr Epilogues<T> table = {row_sums<T>, squared_difference<T>, linear_weights<T>,
                                         taylor_weights<T>};
  return table;
}

template const Epilogues<float>& epilogues<float>();
template const Epilogues<double>& epilogues<double>();

}  // namespace kdk::gram_mse::KDK_SIMD_LEVEL
