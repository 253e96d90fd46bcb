// SPDX-License-Identifier: Apache-2.0
// Sums over the lanes of a warp, always in the same order.
#pragma once

#include "device.h"

namespace kdk::cuda {

inline constexpr unsigned kWarp = 0xffffffffu;  // all lanes

// Over lanes whose numbers differ in the bits kFirst ... kLast.
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

// Number of the lowest bit of x, which is not 0.
__device__ __forceinline__ int lowest_bit(unsigned x) {
#if defined(KDK_CUDA_HOST)
  return __builtin_ctz(x);
#else
  return __ffs(static_cast<int>(x)) - 1;
#endif
}

}  // namespace kdk::cuda
