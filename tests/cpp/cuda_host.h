// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA runtime, so that the kernels in csrc/ compile with a C++ compiler and run
// on a machine without a GPU. See docs/cuda.md.
//
// Blocks run one after another. The threads of a block are fibers: each runs until it has to wait
// for others, at a barrier or in a warp collective, and then the next one runs. Where threads do
// not wait, their order is one that KDKERNELS_CUDA_HOST_ORDER chooses (forward, reverse or
// shuffle-<seed>), so a missing barrier shows as a result that depends on the order. All threads of
// a block must meet at every barrier, and all 32 of a warp in every collective: anything else is
// reported as an error of the launch.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

using cudaStream_t = void*;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace kdk::host {

// Runs a grid; throws std::runtime_error if its threads cannot go on.
void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);

// What a block may have: KDKERNELS_CUDA_HOST_SHARED_KIB, by default as many as on sm_80.
size_t most_shared_bytes();

// The block's dynamic shared memory: exactly as many bytes as asked for, filled with NaN.
unsigned char* shared_memory();

// Copies of `bytes` and zeros up to 16, done at the wait for their group, as cp.async does them.
void copy_later(void* to, const void* from, int bytes);
void close_copies();
void wait_copies(int groups_left);

// Pairs of rows whose distances kernels took from differences, which products would have lost.
inline int64_t differences = 0;

inline int lane() { return static_cast<int>(threadIdx.x) % 32; }

// What every collective is made of: each lane of a warp hands in a value and gets those of all 32,
// which stay until it has come to the collective after the next. `what` is the collective's name;
// all lanes have to mean the same one.
inline constexpr size_t kValueBytes = 64;
const void* gather_bytes(const char* what, const void* value, size_t bytes);

template <typename T>
const T* gather(const char* what, const T& value) {
  static_assert(sizeof(T) <= kValueBytes && std::is_trivially_copyable_v<T>);
  return static_cast<const T*>(gather_bytes(what, &value, sizeof(T)));
}

}  // namespace kdk::host

void __syncthreads();
inline void __syncwarp(unsigned = ~0u) { kdk::host::gather(__func__, 0); }
inline unsigned __ballot_sync(unsigned, int predicate) {
  const bool* votes = kdk::host::gather(__func__, predicate != 0);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(votes[lane]) << lane;
  return result;
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return kdk::host::gather(__func__, value)[from & 31];
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return kdk::host::gather(__func__, value)[(kdk::host::lane() ^ mask) & 31];
}
inline void __threadfence() {}
template <std::integral T>  // no others: their results depend on the order
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}
template <std::integral T>
T atomicMin(T* address, T value) {
  return std::exchange(*address, std::min(*address, value));
}
