// SPDX-License-Identifier: Apache-2.0
// The gradient of features whose losses have kept their derivatives: rows times factors.
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
