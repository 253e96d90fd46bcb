// SPDX-License-Identifier: Apache-2.0
// Semaphores say which block of a split product comes last. The launch before the product clears
// them.
#pragma once

#include "device.h"

namespace kdk::cuda {

// Sets semaphores to 0. The blocks along the x axis of the grid share the work.
__device__ __forceinline__ void clear_semaphores(unsigned* semaphores, int64_t count) {
  if (blockIdx.y != 0 || blockIdx.z != 0) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < count;
       t += step)
    semaphores[t] = 0;
}

}  // namespace kdk::cuda
