// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies move 16 bytes from global to shared memory and pass no register (cp.async,
// sm_80).
#pragma once

#include "device.h"

namespace kdk::cuda {

// Copies the first `bytes` of 16 bytes, and puts zeros behind them. Where `bytes` is 0, `from` is
// not read. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
#if defined(KDK_CUDA_HOST)
  kdk::host::copy_later(to, from, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes)
               : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#if defined(KDK_CUDA_HOST)
  kdk::host::close_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies but those of the latest kLeft groups.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
#if defined(KDK_CUDA_HOST)
  kdk::host::wait_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace kdk::cuda
