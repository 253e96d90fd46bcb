// SPDX-License-Identifier: Apache-2.0
// These kernels are for B no larger than the features are wide. The forward makes both Grams in
// split sums, and then reduces their rows; the backward turns them into weights, which a product
// multiplies with the features. Each direction takes two launches.
#include "../common/cuda/launch.h"
#include "../common/cuda/main_loop.h"
#include "../common/cuda/semaphores.h"
#include "../common/cuda/triangle.h"
#include "gram_mse_device.h"

namespace kdk::gram_mse {
namespace {

using namespace kdk::cuda;

template <typename T>
__device__ void norms_of_rows(const NormsParams& p, int64_t block) {
  const int64_t row = block * kRowsPerBlock + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= 2 * p.G * p.B) return;
  const int64_t side = row / (p.G * p.B), g = row / p.B % p.G, i = row % p.B;
  const Source& x = side == 0 ? p.x[0] : p.x[1];
  const double sum = squared_norm(row_of<T>(x, g, i), x.cols);
  if (lane == 0) p.scale[row] = static_cast<float>(1 / clamp_min(sqrt(sum), kEps));
}

int64_t norms_blocks(const NormsParams& p) {
  return p.scale == nullptr ? 0 : ceil_div(2 * p.G * p.B, kRowsPerBlock);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gram_mse_norms_kernel(const __grid_constant__ NormsParams p) {
  norms_of_rows<T>(p, blockIdx.x);
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    gram_mse_product_kernel(const __grid_constant__ ResidentParams p) {
  const int64_t B = p.problem.B, n = ceil_div(B, kTile), g = blockIdx.z;
  const int64_t tiles = triangle_tiles(n);
  if (blockIdx.x >= 2 * tiles) {
    if (blockIdx.y == 0 && blockIdx.z == 0)
      norms_of_rows<Element<kMath>>(p.norms, blockIdx.x - 2 * tiles);
    return;
  }
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) p.semaphores[g] = 0;
  const int side = blockIdx.x >= tiles;
  const TriangleTile tile = triangle_tile(blockIdx.x - side * tiles, n);
  const int64_t i0 = tile.i * kTile, j0 = tile.j * kTile;
  const Source& x = side == 0 ? p.problem.x[0] : p.problem.x[1];
  const int64_t k0 = blockIdx.y * p.split_length[side];
  const int64_t k_end = k0 + p.split_length[side] < x.cols ? k0 + p.split_length[side] : x.cols;
  Accumulators acc;
  fill(acc, 0);
  multiply<kMath, Along::kContraction, Along::kContraction>(acc, shared_memory(), x, x, g, i0, j0,
                                                            k0, k_end);
  // both halves, so that rows can be read whole
  auto* shared = reinterpret_cast<float*>(shared_memory());
  stage(acc, shared);
  float* out = (side == 0 ? p.parts[0] : p.parts[1]) + (blockIdx.y * p.problem.G + g) * B * B;
  for (int64_t c = threadIdx.x; c < kTile * kTile; c += kThreads) {
    const int row = c / kTile, column = c % kTile;
    if (i0 + row < B && j0 + column < B)
      out[(i0 + row) * B + j0 + column] = *staged(shared, row, column);
    if (i0 < j0 && j0 + row < B && i0 + column < B)
      out[(j0 + row) * B + i0 + column] = *staged(shared, column, row);
  }
}

// Returns the sum of n numbers in fp64 to all threads of the block.
__device__ double sum_of(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += x[i];
  return block_sum(sum, reinterpret_cast<double*>(shared_memory()));
}

constexpr int kManySplits = 8;

__global__ void __launch_bounds__(kThreads)
    gram_mse_finish_kernel(const __grid_constant__ FinishParams p) {
  // A block has a row. Where there are many splits, four threads have an entry, a quarter of the
  // splits each, and the quarters are added in their order.
  const Problem& problem = p.problem;
  const int64_t B = problem.B, g = blockIdx.z, i = blockIdx.x;
  const int quarters = p.splits >= kManySplits ? 4 : 1, columns = kThreads / quarters;
  const int quarter = threadIdx.x / columns, column = threadIdx.x % columns;
  const int each = (p.splits + quarters - 1) / quarters;
  const int first = quarter * each, end = first + each < p.splits ? first + each : p.splits;
  auto* shared = reinterpret_cast<float*>(shared_memory());  // [2, kThreads]
  double sums[kSums] = {};
  for (int64_t j0 = 0; j0 < B; j0 += columns) {
    const int64_t j = j0 + column;
    float entry[2] = {};
    KDK_UNROLL
    for (int side = 0; side < 2; ++side) {
      for (int split = first; j < B && split < end; ++split)
        entry[side] += p.parts[side][((split * problem.G + g) * B + i) * B + j];
    }
    if (quarters > 1) {
      KDK_UNROLL
      for (int side = 0; side < 2; ++side) shared[side * kThreads + threadIdx.x] = entry[side];
      __syncthreads();
      KDK_UNROLL
      for (int side = 0; side < 2; ++side) {
        for (int k = 1; k < quarters && quarter == 0; ++k)
          entry[side] += shared[side * kThreads + k * columns + column];
      }
      __syncthreads();
    }
    if (quarter > 0 || j >= B) continue;
    KDK_UNROLL
    for (int side = 0; side < 2; ++side) {
      entry[side] *= row_scale(problem, side, g, i) * row_scale(problem, side, g, j);
      p.gram[side][(g * B + i) * B + j] = entry[side];
    }
    add_entry(problem, sums, entry[0], entry[1]);
  }
  KDK_UNROLL
  for (int k = 0; k < kSums; ++k)
    sums[k] = block_sum(sums[k], reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) finish_row(problem, sums, i, p.coef + g * kCoefs * B, p.row_losses + g * B);
  // the last block of a group adds up its rows
  auto* arrival = reinterpret_cast<unsigned*>(shared_memory());
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *arrival = atomicAdd(p.semaphores + g, 1u);
  __syncthreads();
  const bool last = *arrival + 1 == gridDim.x;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const double total = sum_of(p.row_losses + g * B, B);
  if (threadIdx.x == 0) p.loss[g] = static_cast<float>(total);
}

__global__ void __launch_bounds__(kThreads)
    gram_mse_loss_kernel(const __grid_constant__ LossParams p) {
  const double total = sum_of(p.row_losses + blockIdx.x * p.B, p.B);
  if (threadIdx.x == 0) p.loss[blockIdx.x] = static_cast<float>(total);
}

template <typename T, typename Wide>
__global__ void __launch_bounds__(kThreads)
    gram_mse_bwd_kernel_weights(const __grid_constant__ WeightsParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  clear_semaphores(p.semaphores, p.semaphore_count);
  const int64_t B = p.problem.B, chunks = ceil_div(B, 8), i = at / chunks, j0 = at % chunks * 8;
  const int64_t g = blockIdx.z, base = (g * B + i) * B + j0;
  if (i >= B) return;
  const RowCoefs<Wide> row = row_coefs<Wide>(p, g, i);
  const float dout = p.dout[g * p.dout_stride], scale = row_scale(p.problem, p.side, g, i);
  float w[8] = {};
  for (int e = 0; e < 8 && j0 + e < B; ++e)
    w[e] =
        weight(p, p.side_gram[base + e], p.other_gram[base + e], row, row_coefs<Wide>(p, g, j0 + e),
               dout * scale * row_scale(p.problem, p.side, g, j0 + e));
  store_eight(static_cast<T*>(p.weights) + base, w, B - j0, B % 8 == 0);
}

}  // namespace

void launch_gram_mse_resident(const ResidentParams& params, Math math, cudaStream_t stream) {
  const int64_t n = ceil_div(params.problem.B, kTile);
  const dim3 grid =
      grid_of(2 * triangle_tiles(n) + norms_blocks(params.norms), params.splits, params.problem.G);
  for_math(math, [&]<Math kMath>() {
    launch(gram_mse_product_kernel<kMath>, grid, kThreads, kSharedBytes, stream, params);
  });
}

void launch_gram_mse_finish(const FinishParams& params, cudaStream_t stream) {
  launch(gram_mse_finish_kernel, grid_of(params.problem.B, 1, params.problem.G), kThreads,
         2 * kThreads * sizeof(float), stream, params);
}

void launch_gram_mse_loss(const LossParams& params, int64_t G, cudaStream_t stream) {
  launch(gram_mse_loss_kernel, grid_of(G), kThreads, kThreads / 32 * sizeof(double), stream,
         params);
}

void launch_gram_mse_bwd_weights(const WeightsParams& params, Math math, cudaStream_t stream) {
  const int64_t B = params.problem.B;
  const dim3 grid = grid_of(ceil_div(B * ceil_div(B, 8), kThreads), 1, params.problem.G);
  launch(math == Math::kBFloat16 ? gram_mse_bwd_kernel_weights<bf16_t, float>
                                 : gram_mse_bwd_kernel_weights<float, double>,
         grid, kThreads, 0, stream, params);
}

void launch_gram_mse_norms(const NormsParams& params, Math math, cudaStream_t stream) {
  if (params.scale == nullptr) return;
  for_math(math, [&]<Math kMath>() {
    launch(gram_mse_norms_kernel<Element<kMath>>, grid_of(norms_blocks(params)), kThreads, 0,
           stream, params);
  });
}

}  // namespace kdk::gram_mse
