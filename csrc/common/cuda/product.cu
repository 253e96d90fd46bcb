// SPDX-License-Identifier: Apache-2.0
#include "product.h"

#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "product_tile.h"

namespace kdk::cuda {
namespace {

__device__ void sum_parts(const PartSums& sums, int64_t block) {
  const int64_t i = block * kThreads + threadIdx.x;
  if (i >= sums.size) return;
  float total = 0;
  for (int64_t part = 0; part < sums.count; ++part) total += sums.parts[part * sums.size + i];
  switch (sums.out_dtype) {
    case Dtype::kFloat: static_cast<float*>(sums.out)[i] = total; break;
    case Dtype::kBFloat16: static_cast<bf16_t*>(sums.out)[i] = from_float<bf16_t>(total); break;
    case Dtype::kFloat16: static_cast<fp16_t*>(sums.out)[i] = from_float<fp16_t>(total); break;
  }
}

// Adds up the partial tiles of all splits in their order, in whichever block comes last. Returns
// whether this block is that one.
__device__ bool merge_splits(Accumulators& acc, const ProductParams& p, int64_t tile,
                             unsigned char* shared) {
  const int64_t tiles = p.tiles * gridDim.z;
  const auto part = [&](int64_t split) {
    return p.partials + (split * tiles + tile) * kTile * kTile + threadIdx.x;
  };
  float* mine = part(blockIdx.y);
  for_each_accumulator([&](int i, int j, int c, int, int) {
    mine[((i * 4 + j) * 4 + c) * kThreads] = acc[i][j][c];
  });
  __threadfence();
  __syncthreads();
  auto* arrival = reinterpret_cast<unsigned*>(shared);
  if (threadIdx.x == 0) *arrival = atomicAdd(p.semaphores + tile, 1u);
  __syncthreads();
  const bool last = *arrival + 1 == static_cast<unsigned>(p.splits);
  __syncthreads();  // the tile is staged where the arrival is
  if (!last) return false;
  __threadfence();
  fill(acc, 0);
  for (int split = 0; split < p.splits; ++split) {
    const float* theirs = part(split);
    for_each_accumulator([&](int i, int j, int c, int, int) {
      acc[i][j][c] += theirs[((i * 4 + j) * 4 + c) * kThreads];
    });
  }
  return true;
}

template <Math kMath, Along kA>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    product_kernel(const __grid_constant__ ProductParams p) {
  unsigned char* shared = shared_memory();
  if (blockIdx.x >= p.tiles) {
    if (blockIdx.y == 0 && blockIdx.z == 0) sum_parts(p.sums, blockIdx.x - p.tiles);
    return;
  }
  // tiles of one column block follow one another, so that they find b in the L2 cache
  const int64_t down = ceil_div(p.M, kTile), g = blockIdx.z;
  const int64_t m0 = blockIdx.x % down * kTile, n0 = blockIdx.x / down * kTile;
  const int64_t k0 = blockIdx.y * p.split_length;
  const int64_t k_end = end_of_split(p);
  Accumulators acc;
  fill(acc, 0);
  multiply<kMath, kA, Along::kOutput>(acc, shared, p.a, p.b, g, m0, n0, k0, k_end);
  if (p.splits > 1 && !merge_splits(acc, p, g * p.tiles + blockIdx.x, shared)) return;
  const float scale = p.scale ? p.scale[g * p.scale_stride] : 1.0f;
  const int64_t base = g * p.M * p.N;
  const float* add = p.add ? p.add + base : nullptr;
  auto* tile = reinterpret_cast<float*>(shared);
  stage(acc, tile);
  if (p.out_dtype == Dtype::kFloat) {
    store_tile(tile, static_cast<float*>(p.out) + base, add, p, m0, n0, scale);
  } else {
    using Narrow = std::conditional_t<kMath == Math::kBFloat16, bf16_t, fp16_t>;
    store_tile(tile, static_cast<Narrow*>(p.out) + base, add, p, m0, n0, scale);
  }
}

__global__ void __launch_bounds__(kThreads)
    part_sums_kernel(const __grid_constant__ PartSums sums) {
  sum_parts(sums, blockIdx.x);
}

}  // namespace

Splits split_contraction(int64_t tiles, int64_t K, Math math) {
  const int64_t step = kStepBytes / static_cast<int64_t>(element_bytes(math));
  const int64_t wanted = ceil_div(2 * processors(), std::max<int64_t>(tiles, 1));
  const int64_t most = std::clamp<int64_t>(std::min(wanted, K / (4 * step)), 1, 64);
  const int64_t length = std::max<int64_t>(ceil_div(ceil_div(K, most), step), 1) * step;
  return {static_cast<int>(std::max<int64_t>(ceil_div(K, length), 1)), length};
}

void launch_product(const ProductParams& params, int64_t groups, Along a_along, Math math,
                    cudaStream_t stream) {
  const dim3 grid =
      grid_of(params.tiles + ceil_div(params.sums.size, kThreads), params.splits, groups);
  for_math(math, [&]<Math kMath>() {
    const auto kernel = a_along == Along::kContraction ? product_kernel<kMath, Along::kContraction>
                                                       : product_kernel<kMath, Along::kOutput>;
    launch(kernel, grid, kThreads, kSharedBytes, stream, params);
  });
}

void launch_part_sums(const PartSums& sums, cudaStream_t stream) {
  if (sums.size > 0)
    launch(part_sums_kernel, grid_of(ceil_div(sums.size, kThreads)), kThreads, 0, stream, sums);
}

}  // namespace kdk::cuda
