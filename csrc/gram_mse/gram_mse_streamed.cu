// SPDX-License-Identifier: Apache-2.0
// gram_mse for B larger than the features are wide: a block makes the same tile of both Grams and
// leaves sums of its rows, or weights of a gradient, for some rows of tiles at a time.
#include <type_traits>

#include "../common/cuda/launch.h"
#include "../common/cuda/main_loop.h"
#include "gram_mse_device.h"

namespace kdk::gram_mse {
namespace {

using namespace kdk::cuda;

// Tile (i0, j0) of both Grams, of unit features if they are normalised.
template <Math kMath>
__device__ __forceinline__ void pair_of(Accumulators& a, Accumulators& k, const Problem& p,
                                        int64_t g, int64_t i0, int64_t j0) {
  fill(a, 0);
  fill(k, 0);
  multiply<kMath, Along::kContraction, Along::kContraction>(a, shared_memory(), p.x[0], p.x[0], g,
                                                            i0, j0, 0, p.x[0].cols);
  multiply<kMath, Along::kContraction, Along::kContraction>(k, shared_memory(), p.x[1], p.x[1], g,
                                                            i0, j0, 0, p.x[1].cols);
  if (p.scale == nullptr) return;
  for_each_accumulator([&](int i, int j, int c, int row, int column) {
    a[i][j][c] *= row_scale(p, 0, g, i0 + row) * row_scale(p, 0, g, j0 + column);
    k[i][j][c] *= row_scale(p, 1, g, i0 + row) * row_scale(p, 1, g, j0 + column);
  });
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, 1)
    gram_mse_pair_sums_kernel(const __grid_constant__ PairSumsParams p) {
  const Problem& problem = p.problem;
  const int64_t B = problem.B, i = blockIdx.y, j = p.first + blockIdx.x, g = p.group;
  const int64_t i0 = (p.first + i) * kTile, j0 = j * kTile;
  if (i0 > j0) return;
  Accumulators a, k;
  pair_of<kMath>(a, k, problem, g, i0, j0);
  // rows: over a quad's columns, then over the four warps across; columns: over eight rows of a
  // warp, then over the two warps down
  auto* rows = reinterpret_cast<double*>(shared_memory());  // [kWarpsAcross, kSums, kTile]
  double* columns = rows + kWarpsAcross * kSums * kTile;    // [2, kSums, kTile]
  static_assert((kWarpsAcross + 2) * kSums * kTile * sizeof(double) <= kSharedBytes);
  const int warp = threadIdx.x / 32, across = warp % kWarpsAcross, down = warp / kWarpsAcross;
  KDK_UNROLL
  for (int r = 0; r < 8; ++r) {
    double sums[kSums] = {};
    KDK_UNROLL
    for (int c = 0; c < 8; ++c)
      if (j0 + first_column() + c / 2 * 8 + c % 2 < B)
        add_entry(problem, sums, a[r / 2][c / 2][r % 2 * 2 + c % 2],
                  k[r / 2][c / 2][r % 2 * 2 + c % 2]);
    KDK_UNROLL
    for (int s = 0; s < kSums; ++s) {
      sums[s] = lane_sum<1, 2>(sums[s]);
      if (threadIdx.x % 4 == 0) rows[(across * kSums + s) * kTile + first_row() + 8 * r] = sums[s];
    }
  }
  KDK_UNROLL
  for (int c = 0; c < 8; ++c) {
    double sums[kSums] = {};
    KDK_UNROLL
    for (int r = 0; r < 8; ++r)
      if (i0 + first_row() + 8 * r < B)
        add_entry(problem, sums, a[r / 2][c / 2][r % 2 * 2 + c % 2],
                  k[r / 2][c / 2][r % 2 * 2 + c % 2]);
    KDK_UNROLL
    for (int s = 0; s < kSums; ++s) {
      sums[s] = lane_sum<4, 16>(sums[s]);
      if (threadIdx.x % 32 < 4)
        columns[(down * kSums + s) * kTile + first_column() + c / 2 * 8 + c % 2] = sums[s];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kSums * kTile; at += kThreads) {
    const int s = at / kTile, place = at % kTile;
    double sum = 0;
    for (int w = 0; w < kWarpsAcross; ++w) sum += rows[w * kSums * kTile + at];
    p.along[(blockIdx.x * kSums + s) * p.tiles * kTile + i * kTile + place] = sum;
    if (i0 < j0 && j0 + place < B)
      p.across[(i * kSums + s) * B + j0 + place] = columns[at] + columns[kSums * kTile + at];
  }
}

__global__ void __launch_bounds__(kThreads)
    gram_mse_pair_finish_kernel(const __grid_constant__ PairFinishParams p) {
  const PairSumsParams& from = p.sums;
  const int64_t B = from.problem.B, row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t r = from.first * kTile + row;
  if (r >= B) return;
  const int64_t tile = row / kTile, end = ceil_div(B, kTile) - from.first;
  const bool complete = tile < from.tiles;
  double sums[kSums];
  for (int s = 0; s < kSums; ++s) {
    sums[s] = from.first == 0 ? 0 : p.totals[s * B + r];
    for (int64_t i = 0; i < tile && i < from.tiles; ++i)
      sums[s] += from.across[(i * kSums + s) * B + r];
    for (int64_t j = tile; complete && j < end; ++j)
      sums[s] += from.along[(j * kSums + s) * from.tiles * kTile + row];
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
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (blockIdx.y == 0) {
    for (int64_t t = at; t < weights.ticket_count; t += static_cast<int64_t>(gridDim.x) * kThreads)
      weights.tickets[t] = 0;
  }
  const int64_t B = problem.B, row0 = blockIdx.y * kTile, i0 = p.first + row0,
                j0 = blockIdx.x * kTile;
  Accumulators a, k;
  pair_of<kMath>(a, k, problem, p.group, i0, j0);
  const float dout = weights.dout[p.group * weights.dout_stride];
  KDK_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int64_t column = j0 + first_column() + 8 * j;
    RowCoefs<Wide> own[2];
    float factor[2];
    KDK_UNROLL
    for (int e = 0; e < 2; ++e) {
      own[e] = row_coefs<Wide>(weights, p.group, column + e);
      factor[e] = dout * row_scale(problem, weights.side, p.group, column + e);
    }
    KDK_UNROLL
    for (int r = 0; r < 8; ++r) {
      const int64_t row = row0 + first_row() + 8 * r;
      const RowCoefs<Wide> coefs = row_coefs<Wide>(weights, p.group, p.first + row);
      float w[2];
      KDK_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float s = a[r / 2][j][r % 2 * 2 + e], t = k[r / 2][j][r % 2 * 2 + e];
        w[e] = weight(weights, weights.side == 0 ? s : t, weights.side == 0 ? t : s, coefs, own[e],
                      factor[e]);
      }
      if (row < p.rows && column < B)
        store_pair(static_cast<T*>(weights.weights) + row * B + column, w[0], w[1], column + 1 < B,
                   B % 2 == 0);
    }
  }
}

}  // namespace

void launch_gram_mse_pair_sums(const PairSumsParams& params, Math math, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.problem.B, kTile) - params.first, params.tiles);
  for_math(math, [&]<Math kMath>() {
    launch(gram_mse_pair_sums_kernel<kMath>, grid, kThreads, kSharedBytes, stream, params);
  });
}

void launch_gram_mse_pair_finish(const PairFinishParams& params, cudaStream_t stream) {
  const int64_t rows = params.sums.problem.B - params.sums.first * kTile;
  launch(gram_mse_pair_finish_kernel, grid_of(ceil_div(rows, kThreads)), kThreads, 0, stream,
         params);
}

void launch_gram_mse_bwd_pair_weights(const PairWeightsParams& params, Math math,
                                      cudaStream_t stream) {
  const dim3 grid =
      grid_of(ceil_div(params.weights.problem.B, kTile), ceil_div(params.rows, kTile));
  const auto run = [&]<Math kMath>() {
    launch(gram_mse_bwd_kernel_pair_weights<kMath>, grid, kThreads, kSharedBytes, stream, params);
  };
  switch (math) {
    case Math::kBFloat16: return run.template operator()<Math::kBFloat16>();
    case Math::kTf32x3: return run.template operator()<Math::kTf32x3>();
    default: return run.template operator()<Math::kExact>();
  }
}

}  // namespace kdk::gram_mse
