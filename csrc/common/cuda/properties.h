// SPDX-License-Identifier: Apache-2.0
// Errors of the CUDA runtime become exceptions here, and launches ask here what the device is like.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"

namespace kdk::cuda {

#if defined(KDK_CUDA_HOST)

// The host pretends to have few processors and a small cache, so that small sizes are split and cut
// into chunks too.
inline int processors() { return 4; }
inline int64_t l2_bytes() { return 1 << 18; }
inline size_t shared_bytes() { return kdk::host::most_shared_bytes(); }

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Properties of the current device.
inline int processors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline int64_t l2_bytes() { return attribute(cudaDevAttrL2CacheSize); }
inline size_t shared_bytes() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

#endif

}  // namespace kdk::cuda
