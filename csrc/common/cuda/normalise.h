// SPDX-License-Identifier: Apache-2.0
// Features x are divided by their norms, u = x / |x|, before a loss sees them. Given the gradient v
// of the loss by u, this kernel computes its gradient by x.
#pragma once

#include "operand.h"

namespace kdk::cuda {

struct NormaliseParams {
  Source x;        // [G, B, D]
  const float* v;  // [G, B, D] contiguous
  void* dx;        // [G, B, D] contiguous, of `math`'s dtype
  int64_t G, B;
  // Whether v is already divided by |x|: then it is the gradient by x, except that its part along x
  // still has to be taken away.
  bool divided;
};

void launch_normalise(const NormaliseParams& params, Math math, cudaStream_t stream);

}  // namespace kdk::cuda
