// SPDX-License-Identifier: Apache-2.0
#pragma once

// Marks arithmetic that is written once for the CPU and the CUDA kernels.
#if defined(__CUDACC__)
#define KDK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KDK_HOST_DEVICE inline __attribute__((always_inline))
#endif
