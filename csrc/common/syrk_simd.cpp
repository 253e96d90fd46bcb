// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see simd.h). x is packed, kSyrkDepth columns at a
// time, into panels of kCols rows stored column by column, [panel][k][kCols]; the one copy serves
// as both operands. A tile of kRows x kCols outputs stays in registers over the packed depth: per
// column two vector loads, kRows broadcasts, 2 kRows FMAs.
//
// fp-contract: fast, since products are only added up.
#include "syrk_simd.h"

#include "transpose.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::KDK_SIMD_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 8;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRows = 4;
#else
constexpr int kVectorBytes = 16, kRows = 4;
#endif

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T))));
  static constexpr int kCols = 2 * kVectorBytes / sizeof(T);
  static_assert(kCols <= kSyrkPanel && kSyrkPanel % kCols == 0 && kCols % kRows == 0,
                "syrk_scratch must hold whole panels, and a tile's rows must lie in one panel");
};

// to[k * kCols + i] = from row i, column k; rows_after: of x from its first one on
template <typename T>
void pack(Matrix<const T> x, int64_t rows, int64_t rows_after, int64_t depth, T* to) {
  constexpr int kCols = Lanes<T>::kCols;
  if (x.row_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = x.data + k * x.col_stride;
      T* row = to + k * kCols;
      int64_t i = 0;
      for (; i < rows; ++i) row[i] = from[i];
      for (; i < kCols; ++i) row[i] = 0;
    }
    return;
  }
  int64_t i = 0;
  // 4 x 4 blocks are transposed in registers: stores of one float would bound the time
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 4 <= rows && x.col_stride == 1; i += 4) {
      int64_t k = 0;
      for (; k + 4 <= depth; k += 4) {
        // The next rows lie in other pages, where the hardware's prefetcher starts late.
        if (k % 16 == 0) {
          for (int n = 4; n < 8 && i + n < rows_after; ++n) __builtin_prefetch(x.row(i + n) + k);
        }
        FloatRow rows_of_x[4], columns[4];
        for (int n = 0; n < 4; ++n)
          rows_of_x[n] = *reinterpret_cast<const FloatRow*>(x.row(i + n) + k);
        transpose(rows_of_x, columns);
        for (int n = 0; n < 4; ++n)
          *reinterpret_cast<FloatRow*>(to + (k + n) * kCols + i) = columns[n];
      }
      for (; k < depth; ++k) {
        for (int n = 0; n < 4; ++n) to[k * kCols + i + n] = x.row(i + n)[k];
      }
    }
  }
  for (; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k) to[k * kCols + i] = x.row(i)[k * x.col_stride];
  }
  for (; i < kCols; ++i) {
    for (int64_t k = 0; k < depth; ++k) to[k * kCols + i] = 0;
  }
}

// out (+)= rows kRows of one panel times all of another
template <typename T>
void tile(const T* left, const T* right, int64_t depth, bool add, int64_t rows, int64_t cols,
          Matrix<T> out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kCols = Lanes<T>::kCols, kLanes = kCols / 2;
  Vector sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector b0 = *reinterpret_cast<const Vector*>(right + k * kCols);
    const Vector b1 = *reinterpret_cast<const Vector*>(right + k * kCols + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const T a = left[k * kCols + i];
      sum[i][0] += a * b0;
      sum[i][1] += a * b1;
    }
  }
  // Whole rows are stored as vectors; the last panel's go through a buffer.
  T edge[kCols];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
    T* row = out.row(i);
    T* to = cols == kCols ? row : edge;
    if (add && cols == kCols) {
      sum[i][0] += *reinterpret_cast<const Vector*>(to);
      sum[i][1] += *reinterpret_cast<const Vector*>(to + kLanes);
    }
    *reinterpret_cast<Vector*>(to) = sum[i][0];
    *reinterpret_cast<Vector*>(to + kLanes) = sum[i][1];
    for (int64_t j = 0; cols < kCols && j < cols; ++j) row[j] = add ? row[j] + edge[j] : edge[j];
  }
}

}  // namespace

template <typename T>
void syrk(Matrix<const T> x, T* scratch, Matrix<T> out) {
  constexpr int kCols = Lanes<T>::kCols;
  const int64_t m = x.rows, panel = kSyrkDepth * kCols;
  int64_t k0 = 0;
  do {
    const int64_t depth = x.cols - k0 < kSyrkDepth ? x.cols - k0 : kSyrkDepth;
    for (int64_t j0 = 0; j0 < m; j0 += kCols) {
      const int64_t cols = m - j0 < kCols ? m - j0 : kCols;
      T* right = scratch + j0 / kCols * panel;
      pack<T>(x.block(j0, cols, k0, depth), cols, m - j0, depth, right);
      for (int64_t i0 = 0; i0 < j0 + cols; i0 += kRows) {
        const int64_t rows = m - i0 < kRows ? m - i0 : kRows;
        const T* left = scratch + i0 / kCols * panel + i0 % kCols;
        tile<T>(left, right, depth, k0 > 0, rows, cols, out.block(i0, rows, j0, cols));
      }
    }
    k0 += kSyrkDepth;
  } while (k0 < x.cols);
}

template void syrk<float>(Matrix<const float>, float*, Matrix<float>);
template void syrk<double>(Matrix<const double>, double*, Matrix<double>);

}  // namespace kdk::KDK_SIMD_LEVEL
