// SPDX-License-Identifier: Apache-2.0
// The gradient of features from that of unit vectors.
#pragma once

#include "operand.h"

namespace kdk::cuda {

struct NormaliseParams {
  Source x;        // [G, B, D]
  const float* v;  // [G, B, D] contiguous
  void* dx;        // likewise, of `math`'s dtype
  int64_t G, B;
  bool divided;  // whether v is by the features but for what is along them, so already over |x|
};

void launch_normalise(const NormaliseParams& params, Math math, cudaStream_t stream);

}  // namespace kdk::cuda
