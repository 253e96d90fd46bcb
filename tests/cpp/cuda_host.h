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

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>

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
// One block runs at a time, so what is shared within a block can be static.
#define __shared__ static

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace kdk::host {

// Runs a grid; throws std::runtime_error if its threads cannot go on.
void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);

// The block's dynamic shared memory: exactly as many bytes as asked for, filled with NaN.
unsigned char* shared_memory();

void sync_block();

// What a warp does together: every lane hands in `in` and a place for its result, and the last one
// to come computes all results. `what` names the collective; all lanes have to mean the same one.
using Collective = void (*)(const void* const in[32], void* const out[32]);
void sync_warp(Collective what, const void* in, void* out);

// Copies that complete at a wait, in groups as cp.async has them.
void copy_later(void* to, const void* from, int bytes, int zeros);
void close_copies();
void wait_copies(int groups_left);

template <typename T>
struct LaneValue {
  T value;
  int lane;  // that is read
};

template <typename T>
T shuffle(T value, int from) {
  const LaneValue<T> in{value, from};
  T out;
  const Collective exchange = [](const void* const in[32], void* const out[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      const auto& asked = *static_cast<const LaneValue<T>*>(in[lane]);
      *static_cast<T*>(out[lane]) = static_cast<const LaneValue<T>*>(in[asked.lane & 31])->value;
    }
  };
  sync_warp(exchange, &in, &out);
  return out;
}

void ballot(const void* const in[32], void* const out[32]);
void meet(const void* const in[32], void* const out[32]);
// Fragments as the tensor-core instructions of sm_80 lay them out over a warp.
struct Fragments {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};
void mma_bf16(const void* const in[32], void* const out[32]);  // d += a b, 16 x 8 x 16
void mma_fp16(const void* const in[32], void* const out[32]);
void mma_tf32(const void* const in[32], void* const out[32]);  // 16 x 8 x 8
// Four 8 x 8 matrices of 16 bits; lane l gives row l % 8 of matrix l / 8.
void load_matrices(const void* const in[32], void* const out[32]);
void load_matrices_transposed(const void* const in[32], void* const out[32]);

inline int lane() { return static_cast<int>(threadIdx.x) % 32; }

}  // namespace kdk::host

inline void __syncthreads() { kdk::host::sync_block(); }
inline void __syncwarp(unsigned = ~0u) { kdk::host::sync_warp(kdk::host::meet, nullptr, nullptr); }
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned result;
  kdk::host::sync_warp(kdk::host::ballot, &predicate, &result);
  return result;
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return kdk::host::shuffle(value, from);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return kdk::host::shuffle(value, kdk::host::lane() ^ mask);
}
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}
inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  if (value < old) *address = value;
  return old;
}
