// SPDX-License-Identifier: Apache-2.0
// Where a loss has kept its derivative by the features, the gradient of the features is that
// derivative with each row multiplied by a factor.
#pragma once

#include "parallel.h"
#include "rows_simd.h"
#include "stable.h"

namespace kdk {

// Multiplies row i of x [B, D] by factor i of `factors` [B]. Both are in T.
template <typename T>
Tensor scaled_rows(const Tensor& x, const Tensor& factors) {
  const Tensor rows = torch::stable::contiguous(x);
  const int64_t B = rows.size(0), D = rows.size(1), stride = factors.stride(0);
  const Tensor result = empty({B, D}, scalar_type_of<T>);
  const auto from = matrix<const T>(rows);
  const auto to = matrix<T>(result);
  const auto* factor = static_cast<const T*>(factors.const_data_ptr());
  parallel_each(B, D, [&](int64_t i) {
    rows::loops<T>().scale(from.row(i), factor[i * stride], to.row(i), D);
  });
  return result;
}

}  // namespace kdk
