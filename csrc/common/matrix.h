// SPDX-License-Identifier: Apache-2.0
// A matrix here is a view of strided memory. Sizes and strides are in elements.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace kdk {

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  static KDK_HOST_DEVICE Matrix contiguous(T* data, int64_t rows, int64_t cols) {
    return {data, rows, cols, cols, 1};
  }

  KDK_HOST_DEVICE T* row(int64_t i) const { return data + i * row_stride; }

  KDK_HOST_DEVICE Matrix block(int64_t row0, int64_t n_rows, int64_t col0, int64_t n_cols) const {
    return {data + row0 * row_stride + col0 * col_stride, n_rows, n_cols, row_stride, col_stride};
  }

  KDK_HOST_DEVICE Matrix row_block(int64_t row0, int64_t n_rows) const {
    return block(row0, n_rows, 0, cols);
  }

  KDK_HOST_DEVICE Matrix t() const { return {data, cols, rows, col_stride, row_stride}; }

  KDK_HOST_DEVICE operator Matrix<const T>() const {
    return {data, rows, cols, row_stride, col_stride};
  }
};

}  // namespace kdk
