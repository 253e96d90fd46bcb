// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
#include "correlation_simd.h"

#include "../common/lanes.h"

namespace kdk::correlation::KDK_SIMD_LEVEL {
namespace {

using namespace kdk::KDK_SIMD_LEVEL;

constexpr int64_t kChunk = 128;  // columns whose sums stay in the first cache

template <typename T>
Softmax<T> softmax(const T* z, int64_t n, T temperature, T* y) {
  constexpr T kLeast = -__builtin_huge_valf();
  Vector<T> most = Vector<T>{} + kLeast;
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    const Vector<T> x = load<kFull>(z + j, count) / temperature;
    const Vector<T> inside = within<kFull, T>(x, count, kLeast);
    most = inside > most ? inside : most;
    store<kFull, T>(y + j, x, count);
  });
  T max = kLeast;  // passes over NaN, which the sum does not
  for (int i = 0; i < kCount<T>; ++i) max = most[i] > max ? most[i] : max;
  Vector<T> total{};
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    const Vector<T> e = exp_of_negative<T>(load<kFull>(y + j, count) - max);
    total += within<kFull, T>(e, count, 0);
    store<kFull, T>(y + j, e, count);
  });
  const T inverse = static_cast<T>(1 / sum<T>(total));
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] *= inverse;
  return {max, inverse};
}

template <typename T>
Moments moments(const T* a, const T* b, int64_t n, T centre) {
  Vector<T> aa{}, bb{}, ab{};
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    const Vector<T> x = within<kFull, T>(load<kFull>(a + j, count) - centre, count, 0);
    const Vector<T> y = within<kFull, T>(load<kFull>(b + j, count) - centre, count, 0);
    aa += x * x;
    bb += y * y;
    ab += x * y;
  });
  return {sum<T>(aa), sum<T>(bb), sum<T>(ab)};
}

// Joins, for a chunk of columns, the moments of `count` rows about their means to those of `before`
// rows.
inline __attribute__((always_inline)) void join(const Columns& from, double count, double before,
                                                int64_t n, const Columns& into) {
  const double share = count / (before + count), weight = before * share;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const double a = from.mean_a[j] - into.mean_a[j], b = from.mean_b[j] - into.mean_b[j];
    into.aa[j] += from.aa[j] + weight * (a * a);
    into.bb[j] += from.bb[j] + weight * (b * b);
    into.ab[j] += from.ab[j] + weight * (a * b);
    into.mean_a[j] += share * a;
    into.mean_b[j] += share * b;
  }
}

void merge_columns(const Columns& from, int64_t count, int64_t before, int64_t n,
                   const Columns& into) {
  join(from, static_cast<double>(count), static_cast<double>(before), n, into);
}

template <typename T>
void add_rows(Matrix<const T> a, Matrix<const T> b, int64_t before, bool centered,
              const Columns& columns) {
  for (int64_t j0 = 0; j0 < a.cols; j0 += kChunk) {
    const int64_t n = a.cols - j0 < kChunk ? a.cols - j0 : kChunk;
    double mean_a[kChunk] = {}, mean_b[kChunk] = {}, aa[kChunk] = {}, bb[kChunk] = {},
           ab[kChunk] = {};
    if (centered) {
      // from the first row on, so that equal rows have their value as mean, exactly
      const T *first_a = a.row(0) + j0, *first_b = b.row(0) + j0;
      for (int64_t i = 1; i < a.rows; ++i) {
        const T *x = a.row(i) + j0, *y = b.row(i) + j0;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          mean_a[j] += static_cast<double>(x[j]) - static_cast<double>(first_a[j]);
          mean_b[j] += static_cast<double>(y[j]) - static_cast<double>(first_b[j]);
        }
      }
      const double inverse = 1 / static_cast<double>(a.rows);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        mean_a[j] = first_a[j] + mean_a[j] * inverse;
        mean_b[j] = first_b[j] + mean_b[j] * inverse;
      }
    }
    for (int64_t i = 0; i < a.rows; ++i) {
      const T *x = a.row(i) + j0, *y = b.row(i) + j0;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const double u = x[j] - mean_a[j], v = y[j] - mean_b[j];
        aa[j] += u * u;
        bb[j] += v * v;
        ab[j] += u * v;
      }
    }
    join({mean_a, mean_b, aa, bb, ab}, static_cast<double>(a.rows), static_cast<double>(before), n,
         {columns.mean_a + j0, columns.mean_b + j0, columns.aa + j0, columns.bb + j0,
          columns.ab + j0});
  }
}

template <typename T>
void gradient(const T* z_a, const T* z_b, int64_t n, T temperature, const RowFactors<T>& row,
              const ColumnFactors<T>& columns, T* y, T* dz) {
  Vector<T> inner{};
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    const auto at = [&](const T* p) { return load<kFull>(p + j, count); };
    const Vector<T> a = exp_of_negative<T>(at(z_a) / temperature - row.a.max) * row.a.inverse;
    const Vector<T> b = exp_of_negative<T>(at(z_b) / temperature - row.b.max) * row.b.inverse;
    const Vector<T> by_row = (a - row.centre) * row.side - (b - row.centre) * row.other;
    const Vector<T> by_column =
        (a - at(columns.mean_a)) * at(columns.side) - (b - at(columns.mean_b)) * at(columns.other);
    const Vector<T> dy = by_row + by_column;
    inner += within<kFull, T>(dy * a, count, 0);
    store<kFull, T>(y + j, a, count);
    store<kFull, T>(dz + j, dy, count);
  });
  const T mean = static_cast<T>(sum<T>(inner));
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) dz[j] = y[j] * (dz[j] - mean);
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {softmax<T>, moments<T>, add_rows<T>, merge_columns,
                                     gradient<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::correlation::KDK_SIMD_LEVEL
