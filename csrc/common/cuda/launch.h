// SPDX-License-Identifier: Apache-2.0
// Kernels are launched here. Only the files of kernels and their launches are compiled by nvcc.
#pragma once

#include "properties.h"

namespace kdk::cuda {

inline constexpr size_t kPlainSharedBytes = 48 << 10;  // a kernel asks for more by an attribute

#if defined(KDK_CUDA_HOST)

template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
            const Params& params) {
  kdk::host::run(grid, threads, shared_bytes, [&] { kernel(params); });
}

#else

// A kernel takes one struct of parameters. Nothing here waits for the device.
template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes,
            cudaStream_t stream, const Params& params) {
  if (shared_bytes > kPlainSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  check(cudaGetLastError(), "a kernel launch");
}

#endif

// The x axis of a grid holds 2^31 - 1 blocks, the others 65535.
inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  if (x > 0x7fffffff || y > 0xffff || z > 0xffff)
    throw std::runtime_error("a grid of " + std::to_string(x) + " x " + std::to_string(y) + " x " +
                             std::to_string(z) + " blocks is larger than a launch can be");
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

}  // namespace kdk::cuda
