// SPDX-License-Identifier: Apache-2.0
// This header includes CUDA, or what stands in for it where kernels run on the host (docs/cuda.md).
// Kernels include no torch header: nvcc takes seconds for a file without one, and minutes for a
// file with one.
#pragma once

#if defined(KDK_CUDA_HOST)
#include "cuda_host.h"
#define KDK_UNROLL
#define KDK_ROLLED
#else
#include <cuda_runtime.h>
#define KDK_UNROLL _Pragma("unroll")
#define KDK_ROLLED _Pragma("unroll 1")
#endif

#include <cstdint>

#include "../integers.h"

namespace kdk::cuda {

// Dynamic shared memory of the block, aligned to 128 bytes. Kernels use no other.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(KDK_CUDA_HOST)
  return kdk::host::shared_memory();
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
#endif
}

// Counts pairs of rows whose distances come from differences, on the host only, for tests.
__device__ __forceinline__ void count_differences([[maybe_unused]] int64_t pairs) {
#if defined(KDK_CUDA_HOST)
  kdk::host::differences += pairs;
#endif
}

}  // namespace kdk::cuda
