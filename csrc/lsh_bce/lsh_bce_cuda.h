// SPDX-License-Identifier: Apache-2.0
// This header declares the launchers of the CUDA kernels of lsh_bce, and their parameters. The
// residuals are described in kdkernels/ops/lsh_bce.py.
#pragma once

#include "../common/cuda/product.h"

namespace kdk::lsh_bce {

// Features and directions, whose product is made in tiles.
struct CudaProjection {
  cuda::Source features;  // [B, D]
  cuda::Source weight;    // [N, D]
  const void* bias;       // [N], bias_stride apart; null for 0
  int64_t bias_stride;
};

struct EncodeParams {
  CudaProjection projection;
  uint8_t* codes;  // [B, ceil(N / 8)] contiguous
};

struct ProjectParams {
  CudaProjection projection;
  const uint8_t* codes;  // [B, ceil(N / 8)]
  int64_t codes_stride_b, codes_stride_n;
  const float* factor;  // [B], factor_stride apart, of the derivatives; null for 1
  int64_t factor_stride;
  // The results. Each pointer is null if nobody asks for the result.
  float* loss;  // [tiles of N, B]: sums over the directions of a tile; loss_stride between tiles
  int64_t loss_stride;
  void* dz;      // [B, N] contiguous: factor times the derivatives, in the dtype of the features
  float* dbias;  // [tiles of B, N]: sums of those over the rows of a tile
  unsigned* semaphores;  // [semaphore_count], set to 0 for the launch that follows
  int64_t semaphore_count;
};

void launch_lsh_bce_encode(const EncodeParams& params, cuda::Math math, cudaStream_t stream);
void launch_lsh_bce_project(const ProjectParams& params, cuda::Math math, cudaStream_t stream);

}  // namespace kdk::lsh_bce
