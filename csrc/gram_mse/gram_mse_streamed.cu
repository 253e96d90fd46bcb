// SPDX-License-Identifier: Apache-2.0
// These kernels are for B larger than the features are wide. A block makes the same tile of both
// Grams, on or above the diagonal, and leaves sums of the tile's rows, or weights of a gradient.
// Some rows of tiles are made at a time. Forward and backward of a side take 6 B^2 D
// multiplications.
#include <type_traits>

#include "../common/cuda/launch.h"
#include "../common/cuda/main_loop.h"
#include "../common/cuda/semaphores.h"
#include "gram_mse_device.h"

namespace kdk::gram_mse {
namespace {

using namespace kdk::cuda;

constexpr int kPairSharedBytes = kSharedBytes + kTile * kTile * static_cast<int>(sizeof(float));
static_assert(kPairSharedBytes == 128 << 10, "kdkernels/cuda/gram_mse.py asks for so many");

// Tile (i0, j0) of both Grams, staged: the teacher's tile k lies where the operands were, the
// student's tile a behind it.
struct Pair {
  float *a, *k;
};

template <Math kMath>
__device__ __forceinline__ Pair pair_of(const Problem& p, int64_t g, int64_t i0, int64_t j0) {
  unsigned char* shared = shared_memory();
  const Pair pair{reinterpret_cast<float*>(shared + kSharedBytes),
                  reinterpret_cast<float*>(shared)};
  for (int side = 0; side < 2; ++side) {
    const Source& x = side == 0 ? p.x[0] : p.x[1];
    Accumulators acc;
    fill(acc, 0);
    multiply<kMath, Along::kContraction, Along::kContraction>(acc, shared, x, x, g, i0, j0, 0,
                                                              x.cols);
    stage(acc, side == 0 ? pair.a : pair.k);
  }
  return pair;
}

// Returns one entry of a staged tile, as unit features have it if features are normalised.
__device__ __forceinline__ float entry(const Problem& p, float* tile, int side, int64_t g,
                                       int64_t i0, int64_t j0, int row, int column) {
  const float x = *staged(tile, row, column);
  if (p.scale == nullptr) return x;
  return x * row_scale(p, side, g, i0 + row) * row_scale(p, side, g, j0 + column);
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, 1)
    gram_mse_pair_sums_kernel(const __grid_constant__ PairSumsParams p) {
  const Problem& problem = p.problem;
  const int64_t B = problem.B, i = blockIdx.y, j = p.first + blockIdx.x, g = p.group;
  const int64_t i0 = (p.first + i) * kTile, j0 = j * kTile;
  if (i0 > j0) return;
  const Pair pair = pair_of<kMath>(problem, g, i0, j0);
  const auto add = [&](double (&sums)[kSums], int row, int column) {
    add_entry(problem, sums, entry(problem, pair.a, 0, g, i0, j0, row, column),
              entry(problem, pair.k, 1, g, i0, j0, row, column));
  };
  const int columns = j0 + kTile < B ? kTile : static_cast<int>(B - j0);
  const int rows = i0 + kTile < B ? kTile : static_cast<int>(B - i0);
  // a warp has a row, whatever lies beyond the batch is not added
  for (int row = threadIdx.x / 32; row < kTile; row += kRowsPerBlock) {
    double sums[kSums] = {};
    for (int column = threadIdx.x % 32; column < columns; column += 32) add(sums, row, column);
    KDK_UNROLL
    for (int s = 0; s < kSums; ++s) {
      sums[s] = warp_sum(sums[s]);
      if (threadIdx.x % 32 == 0)
        p.along[(blockIdx.x * kSums + s) * p.tiles * kTile + i * kTile + row] = sums[s];
    }
  }
  // above the diagonal a thread has a column, for the row that it is by symmetry
  if (i0 == j0 || static_cast<int>(threadIdx.x) >= columns) return;
  double sums[kSums] = {};
  for (int row = 0; row < rows; ++row) add(sums, row, threadIdx.x);
  KDK_UNROLL
  for (int s = 0; s < kSums; ++s) p.across[(i * kSums + s) * B + j0 + threadIdx.x] = sums[s];
}

// A block has 32 rows, and each of its warps some of the tiles that add to their sums.
__global__ void __launch_bounds__(kThreads)
    gram_mse_pair_finish_kernel(const __grid_constant__ PairFinishParams p) {
  const PairSumsParams& from = p.sums;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t B = from.problem.B, row = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const int64_t r = from.first * kTile + row;
  const int64_t tile = row / kTile, end = ceil_div(B, kTile) - from.first;
  const bool complete = tile < from.tiles;
  auto* parts = reinterpret_cast<double*>(shared_memory());  // [kSums, kThreads]
  for (int s = 0; s < kSums; ++s) {
    double sum = 0;
    for (int64_t i = warp; r < B && i < tile && i < from.tiles; i += kRowsPerBlock)
      sum += from.across[(i * kSums + s) * B + r];
    for (int64_t j = tile + warp; r < B && complete && j < end; j += kRowsPerBlock)
      sum += from.along[(j * kSums + s) * from.tiles * kTile + row];
    parts[s * kThreads + threadIdx.x] = sum;
  }
  __syncthreads();
  if (warp > 0 || r >= B) return;
  double sums[kSums];
  for (int s = 0; s < kSums; ++s) {
    sums[s] = from.first == 0 ? 0 : p.totals[s * B + r];
    for (int part = 0; part < kRowsPerBlock; ++part)
      sums[s] += parts[s * kThreads + part * 32 + lane];
    p.totals[s * B + r] = sums[s];
  }
  if (complete) finish_row(from.problem, sums, r, p.coef, p.row_losses);
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, 1)
    gram_mse_bwd_kernel_pair_weights(const __grid_constant__ PairWeightsParams p) {
  // fp16 features come as fp32 here: their weights could overflow
  using T = Element<kMath>;
  using Wide = std::conditional_t<kMath == Math::kBFloat16, float, double>;
  const WeightsParams& weights = p.weights;
  const Problem& problem = weights.problem;
  clear_semaphores(weights.semaphores, weights.semaphore_count);
  clear_semaphores(p.more_semaphores, p.more_semaphore_count);
  if (blockIdx.y > blockIdx.x) return;
  const int64_t width = problem.B - p.first, g = p.group;
  const int64_t row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  const int64_t i0 = p.first + row0, j0 = p.first + column0;
  const Pair pair = pair_of<kMath>(problem, g, i0, j0);
  const int side = weights.side;
  const float dout = weights.dout[g * weights.dout_stride];
  auto* out = static_cast<T*>(weights.weights);
  const bool together = width % 8 == 0;
  // a thread has a column, and leaves its weights where a was
  {
    const int column = threadIdx.x % kTile;
    const RowCoefs<Wide> across = row_coefs<Wide>(weights, g, j0 + column);
    const float scale = dout * row_scale(problem, side, g, j0 + column);
    for (int row = threadIdx.x / kTile; row < kTile; row += kThreads / kTile) {
      const float a = entry(problem, pair.a, 0, g, i0, j0, row, column);
      const float k = entry(problem, pair.k, 1, g, i0, j0, row, column);
      *staged(pair.a, row, column) = weight(weights, side == 0 ? a : k, side == 0 ? k : a,
                                            row_coefs<Wide>(weights, g, i0 + row), across,
                                            scale * row_scale(problem, side, g, i0 + row));
    }
  }
  __syncthreads();
  for_each_eight(pair.a, p.rows - row0, width - column0, [&](float (&w)[8], int row, int column) {
    store_eight(out + (row0 + row) * width + column0 + column, w, width - column0 - column,
                together);
  });
  // above the diagonal also what is below it, where these rows have it
  if (row0 == column0 || column0 >= p.rows) return;
  const int row = threadIdx.x % kTile;
  if (column0 + row >= p.rows) return;
  for (int i = threadIdx.x / kTile * 8; i < kTile; i += kThreads / kTile * 8) {
    float w[8];
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) w[e] = *staged(pair.a, i + e, row);
    store_eight(out + (column0 + row) * width + row0 + i, w, 8, together);
  }
}

}  // namespace

void launch_gram_mse_pair_sums(const PairSumsParams& params, Math math, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.problem.B, kTile) - params.first, params.tiles);
  for_math(math, [&]<Math kMath>() {
    launch(gram_mse_pair_sums_kernel<kMath>, grid, kThreads, kPairSharedBytes, stream, params);
  });
}

void launch_gram_mse_pair_finish(const PairFinishParams& params, cudaStream_t stream) {
  const int64_t rows = params.sums.problem.B - params.sums.first * kTile;
  launch(gram_mse_pair_finish_kernel, grid_of(ceil_div(rows, 32)), kThreads,
         kSums * kThreads * sizeof(double), stream, params);
}

void launch_gram_mse_bwd_pair_weights(const PairWeightsParams& params, Math math,
                                      cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.weights.problem.B - params.first, kTile),
                            ceil_div(params.rows, kTile));
  for_wide_math(math, [&]<Math kMath>() {
    launch(gram_mse_bwd_kernel_pair_weights<kMath>, grid, kThreads, kPairSharedBytes, stream,
           params);
  });
}

}  // namespace kdk::gram_mse
