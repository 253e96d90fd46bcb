// SPDX-License-Identifier: Apache-2.0
// Where a loss has kept its derivative by the features, the gradient of the features is that
// derivative with each row multiplied by a factor.
#pragma once

#include "operand.h"

namespace kdk::cuda {

struct ScaledRowsParams {
  const float* rows;    // [B, D] contiguous
  const float* factor;  // [B], factor_stride apart
  int64_t factor_stride;
  void* out;  // [B, D] contiguous, of `math`'s dtype
  int64_t B, D;
};

void launch_scaled_rows(const ScaledRowsParams& params, Math math, cudaStream_t stream);

}  // namespace kdk::cuda
