// SPDX-License-Identifier: Apache-2.0
// Values are made in the epilogue of the product of rows. In batch, only tiles on and above the
// diagonal are multiplied, and each is stored twice.
#include "../common/cuda/centre_device.h"
#include "../common/cuda/launch.h"
#include "../common/cuda/main_loop.h"
#include "../common/cuda/rows.h"
#include "../common/cuda/triangle.h"
#include "pairwise_cuda.h"

namespace kdk::pairwise {
namespace {

using namespace kdk::cuda;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kMarked = -1;  // what no distance is

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pairwise_row_numbers_kernel(const __grid_constant__ RowNumbersParams p) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t of_x = p.G * p.x[0].rows;
  const bool second = i >= of_x;
  if (second) i -= of_x;
  const Source& x = second ? p.x[1] : p.x[0];
  if (i >= p.G * x.rows) return;
  const int64_t g = i / x.rows;
  const float* point = p.point == nullptr ? nullptr : p.point + g * x.cols;
  const double squared = move_row(row_of<T>(x, g, i % x.rows), point, x.cols,
                                  (second ? p.moved[1] : p.moved[0]) + i * x.cols);
  if (threadIdx.x % 32 != 0) return;
  auto number = static_cast<float>(squared);
  if (p.what == RowNumber::kInverse) {
    number = static_cast<float>(1 / clamp_min(std::sqrt(squared), kEps));
  } else {
    number = number < kNormLimit<float> ? number : kNaN;
    if (p.what == RowNumber::kBound)
      number = close_bound(p.metric, number, p.gamma, p.close_share);
  }
  (second ? p.number[1] : p.number[0])[i] = number;
}

// Calls f(accumulator, k, c) for this thread's 8 x 8 accumulators, where k counts rows and c
// columns.
template <typename F>
__device__ __forceinline__ void for_each_value(Accumulators& acc, const F& f) {
  KDK_UNROLL
  for (int k = 0; k < 8; ++k) {
    KDK_UNROLL
    for (int c = 0; c < 8; ++c) f(acc[k / 2][c / 2][k % 2 * 2 + c % 2], k, c);
  }
}

// Turns products into similarities or squared distances, and squared distances of close pairs, or
// of those whose rounding would show in kRbf, into kMarked. Returns whether a lane of this warp has
// such a pair.
__device__ __forceinline__ bool scale_products(Accumulators& acc, const ValuesParams& p, int64_t g,
                                               int64_t i0, int64_t j0) {
  if (p.metric == Metric::kDot) return false;
  const float *x_number = p.x_number + g * p.x.rows, *y_number = p.y_number + g * p.y.rows;
  const auto row = [](int k) { return first_row() + 8 * k; };
  const auto column = [](int c) { return first_column() + c / 2 * 8 + c % 2; };
  float x[8], y[8];
  KDK_UNROLL
  for (int k = 0; k < 8; ++k) {
    x[k] = i0 + row(k) < p.x.rows ? x_number[i0 + row(k)] : 0.0f;
    y[k] = j0 + column(k) < p.y.rows ? y_number[j0 + column(k)] : 0.0f;
  }
  if (p.metric == Metric::kCosine) {
    for_each_value(acc, [&](float& value, int k, int c) { value = value * x[k] * y[c]; });
    return false;
  }
  const float sharpness = p.metric == Metric::kRbf ? p.sharpness : 0.0f;
  for_each_value(acc, [&](float& value, int k, int c) {
    // in this order, so that nothing is rounded to the digits of the sum of the norms
    const float d2 = (x[k] - value) + (y[c] - value);
    const float size = x[k] + y[c];
    const bool marked = d2 < size * p.close_share || is_sharp(d2, size, sharpness);
    value = marked ? kMarked : d2;
  });
  if (p.in_batch && i0 == j0) {  // itself; NaN stays
    for_each_value(acc, [&](float& value, int k, int c) {
      value = row(k) == column(c) && value == value ? 0.0f : value;
    });
  }
  bool close = false;
  for_each_value(acc, [&](float& value, int, int) { close = close || value == kMarked; });
  return __ballot_sync(kWarp, close) != 0;
}

// Computes the marked squared distances of this warp's part of the tile from differences. Eight
// lanes have a pair.
template <typename T>
__device__ __forceinline__ void differences(float* tile, const ValuesParams& p, int64_t g,
                                            int64_t i0, int64_t j0) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = warp / kWarpsAcross * kWarpRows, column0 = warp % kWarpsAcross * kWarpColumns;
  const int64_t D = p.x.cols;
  for (int row = row0; row < row0 + kWarpRows; ++row) {
    unsigned marked = __ballot_sync(kWarp, *staged(tile, row, column0 + lane) == kMarked);
    while (marked != 0) {
      int mine = -1;
      KDK_UNROLL
      for (int group = 0; group < 4; ++group) {
        if (lane / 8 == group && marked != 0) mine = lowest_bit(marked);
        marked &= marked - 1;
      }
      const T* x = row_of<T>(p.given_x, g, i0 + row);
      const T* y = row_of<T>(p.given_y, g, j0 + column0 + (mine < 0 ? 0 : mine));
      float sum = 0;
      for (int64_t d = lane % 8 * 8; mine >= 0 && d < D; d += 64) {
        float a[8], b[8];
        read_eight(a, x + d, D - d, p.given_x.aligned);
        read_eight(b, y + d, D - d, p.given_y.aligned);
        KDK_UNROLL
        for (int e = 0; e < 8; ++e) sum += (a[e] - b[e]) * (a[e] - b[e]);
      }
      sum = lane_sum<1, 4>(sum);
      if (mine < 0 || lane % 8 != 0) continue;
      *staged(tile, row, column0 + mine) = sum;
      count_differences(1);
    }
  }
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    pairwise_product_kernel(const __grid_constant__ ValuesParams p) {
  using T = Element<kMath>;
  const int64_t N = p.x.rows, M = p.y.rows, down = ceil_div(N, kTile);
  const int64_t tiles = p.in_batch ? triangle_tiles(down) : down * ceil_div(M, kTile);
  const int64_t g = blockIdx.x / tiles, t = blockIdx.x % tiles;
  const TriangleTile at = p.in_batch ? triangle_tile(t, down) : TriangleTile{t % down, t / down};
  const int64_t i0 = at.i * kTile, j0 = at.j * kTile;
  auto* tile = reinterpret_cast<float*>(shared_memory());
  bool close;
  {
    Accumulators acc;
    fill(acc, 0);
    multiply<kMath, Along::kContraction, Along::kContraction>(acc, shared_memory(), p.x, p.y, g, i0,
                                                              j0, 0, p.x.cols);
    close = scale_products(acc, p, g, i0, j0);
    stage(acc, tile);
  }
  if (close) differences<T>(tile, p, g, i0, j0);
  __syncthreads();

  // on the diagonal what is below comes from above
  T* out = static_cast<T*>(p.out) + g * N * M;
  const bool together = M % 8 == 0, diagonal = p.in_batch && i0 == j0,
             twice = p.in_batch && !diagonal;
  for_each_eight(tile, N - i0, M - j0, [&](float (&x)[8], int row, int column) {
    if (diagonal && column < row) {
      KDK_UNROLL
      for (int e = 0; e < 8; ++e) x[e] = column + e < row ? *staged(tile, column + e, row) : x[e];
    }
    if (is_distance(p.metric)) {
      KDK_UNROLL
      for (int e = 0; e < 8; ++e) x[e] = from_squared(p.metric, x[e], p.gamma);
    }
    if (twice) stage_eight(x, tile, row, column);
    store_eight(out + (i0 + row) * M + j0 + column, x, M - j0 - column, together);
  });
  if (!twice) return;
  __syncthreads();
  // four lanes have 32 neighbours of a row, for the banks' sake
  for (int c = threadIdx.x; c < kTile * kTile / 8; c += kThreads) {
    const int row = c / 32 % (kTile / 8) * 8 + c / 4 % 8, column = (c % 4 + c / 512 * 4) * 8;
    if (j0 + row >= N) continue;
    float x[8];
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = *staged(tile, column + e, row);
    store_eight(out + (j0 + row) * M + i0 + column, x, M - i0 - column, together);
  }
}

}  // namespace

void launch_pairwise_row_numbers(const RowNumbersParams& params, Math math, cudaStream_t stream) {
  const dim3 grid =
      grid_of(ceil_div(params.G * (params.x[0].rows + params.x[1].rows), kRowsPerBlock));
  for_math(math, [&]<Math kMath>() {
    launch(pairwise_row_numbers_kernel<Element<kMath>>, grid, kThreads, 0, stream, params);
  });
}

void launch_pairwise_values(const ValuesParams& params, Math math, cudaStream_t stream) {
  const int64_t down = ceil_div(params.x.rows, kTile), across = ceil_div(params.y.rows, kTile);
  const dim3 grid = grid_of(params.G * (params.in_batch ? triangle_tiles(down) : down * across));
  for_math(math, [&]<Math kMath>() {
    launch(pairwise_product_kernel<kMath>, grid, kThreads, kSharedBytes, stream, params);
  });
}

}  // namespace kdk::pairwise
