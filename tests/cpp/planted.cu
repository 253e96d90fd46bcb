// SPDX-License-Identifier: Apache-2.0
// Kernels with a fault that can be switched on, to see that running on the host finds it.
#include <cstdio>
#include <exception>

#include "../../csrc/common/cuda/async_copy.h"
#include "../../csrc/common/cuda/launch.h"

namespace {

using namespace kdk::cuda;

constexpr int kCount = 64;  // threads

struct Params {
  float* out;  // [kCount]
  bool faulty;
};

// Each thread reads what another one wrote.
__global__ void barrier_kernel(const __grid_constant__ Params p) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x;
  shared[i] = static_cast<float>(i);
  if (!p.faulty) __syncthreads();
  p.out[i] = shared[kCount - 1 - i];
}

// The last thread writes one place too far.
__global__ void bounds_kernel(const __grid_constant__ Params p) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x;
  shared[i + (p.faulty ? 1 : 0)] = static_cast<float>(i);
  p.out[i] = shared[i];
}

// Half of the threads do not come to the barrier.
__global__ void divergence_kernel(const __grid_constant__ Params p) {
  const int i = threadIdx.x;
  if (!p.faulty || i % 2 == 0) __syncthreads();
  p.out[i] = static_cast<float>(i);
}

// Half of a warp votes, the other half exchanges values.
__global__ void collective_kernel(const __grid_constant__ Params p) {
  const int i = threadIdx.x;
  const bool votes = !p.faulty || i % 2 == 0;
  const unsigned result = votes ? __ballot_sync(~0u, i % 3 == 0) : __shfl_sync(~0u, 1u, 0);
  p.out[i] = static_cast<float>(result >> i % 32 & 1);
}

// What is copied asynchronously is read without a wait.
__global__ void copy_kernel(const __grid_constant__ Params p) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x;
  p.out[i] = static_cast<float>(i);
  __syncthreads();
  if (i % 4 == 0) copy_async(shared + i, p.out + i, 16);
  copy_async_commit();
  if (!p.faulty) copy_async_wait<0>();
  __syncthreads();
  p.out[i] = shared[i];
}

}  // namespace

// Runs a kernel; the error of its launch into `error`, [256], empty if there is none.
extern "C" __attribute__((visibility("default"))) void planted(int which, bool faulty, float* out,
                                                               char* error) {
  void (*const kernels[])(Params) = {barrier_kernel, bounds_kernel, divergence_kernel, copy_kernel,
                                     collective_kernel};
  error[0] = 0;
  try {
    launch(kernels[which], grid_of(1), kCount, kCount * sizeof(float), nullptr,
           Params{out, faulty});
  } catch (const std::exception& caught) {
    std::snprintf(error, 256, "%s", caught.what());
  }
}
