// SPDX-License-Identifier: Apache-2.0
// Numbers are summed over the lanes of a warp or the threads of a block, always in the same order.
#pragma once

#include "device.h"

namespace kdk::cuda {

inline constexpr unsigned kWarp = 0xffffffffu;  // all lanes

// Returns the sum over the lanes whose numbers differ in the bits kFirst ... kLast.
template <int kFirst, int kLast, typename T>
__device__ __forceinline__ T lane_sum(T x) {
  KDK_UNROLL
  for (int mask = kFirst; mask <= kLast; mask *= 2) x += __shfl_xor_sync(kWarp, x, mask);
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  return lane_sum<1, 16>(x);
}

// Returns the number of the lowest bit that is set in x, which is not 0.
__device__ __forceinline__ int lowest_bit(unsigned x) {
#if defined(KDK_CUDA_HOST)
  return __builtin_ctz(x);
#else
  return __ffs(static_cast<int>(x)) - 1;
#endif
}

// Returns the sum to all threads of the block. `shared` holds one T for each warp, and may be used
// again afterwards.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  T total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += shared[warp];
  __syncthreads();
  return total;
}

}  // namespace kdk::cuda
