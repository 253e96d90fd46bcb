// SPDX-License-Identifier: Apache-2.0
// These kernels surround those of the losses: they put rows into the order of their labels, make
// the distances, and make the gradient from weights on distances.
#include "../common/cuda/centre_device.h"
#include "../common/cuda/launch.h"
#include "../common/cuda/main_loop.h"
#include "../common/cuda/rows.h"
#include "../common/rows_math.h"
#include "triplet_all_cuda.h"

namespace kdk::triplet_all {
namespace {

using namespace kdk::cuda;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Returns how many of n ascending labels are below `label`, or with `past` not above it.
__device__ __forceinline__ int64_t count_labels(const int64_t* labels, int64_t n, int64_t label,
                                                bool past) {
  int64_t low = 0;
  while (n > 0) {
    const int64_t half = n / 2, other = labels[low + half];
    const bool right = other < label || (past && other == label);
    low += right ? half + 1 : 0;
    n = right ? n - half - 1 : half;
  }
  return low;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    triplet_all_prepare_kernel(const __grid_constant__ PrepareParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t lane = threadIdx.x % 32, D = p.from.cols;
  if (i >= p.from.rows) return;
  const int64_t row = p.rows.order[i];
  const T* from = row_of<T>(p.from, 0, row);
  const auto place = [&](const Source& rows) {
    return static_cast<float*>(const_cast<void*>(rows.data)) + i * rows.stride;
  };
  float *to = place(p.rows.x), *given = place(p.rows.given);
  const auto norm = static_cast<float>(move_row(from, p.point, D, to));
  const bool finite = norm < kNormLimit<float>;
  for (int64_t d = lane; d < p.rows.x.stride; d += 32) {
    given[d] = finite && d < D ? to_float(from[d]) : 0.0f;
    if (!finite || d >= D) to[d] = 0;
  }
  for (int64_t d = lane; p.rows.weighted != nullptr && d < D; d += 32)
    p.rows.weighted[i * D + d] = 0;
  if (lane == 0) {
    p.rows.norm[i] = finite ? norm : kNaN;
    p.place[row] = i;
    if (p.rows.sums != nullptr) p.rows.sums[i] = 0;
  }
  if (p.begin != nullptr && lane < 2)
    (lane == 0 ? p.begin : p.end)[i] = count_labels(p.reference_label, p.M, p.label[i], lane == 1);
}

// Returns whether any thread of the block says so. `shared` may be used again afterwards.
__device__ __forceinline__ bool any_of(bool says, unsigned char* shared) {
  auto* warps = reinterpret_cast<unsigned*>(shared);
  const unsigned lanes = __ballot_sync(kWarp, says);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = lanes;
  __syncthreads();
  unsigned all = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) all |= warps[warp];
  __syncthreads();
  return all != 0;
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    triplet_all_product_kernel(const __grid_constant__ DistancesParams p) {
  const Rows &x = p.anchors, &r = p.references;
  const int64_t down = ceil_div(x.x.rows, kTile), across = ceil_div(r.x.rows, kTile);
  const int64_t i0 = blockIdx.x % down * kTile, j0 = blockIdx.x / down * kTile;
  const auto squares = [&](const auto& f) {  // f(accumulator, norms, whether they are of a pair)
    KDK_UNROLL
    for (int column = 0; column < 8; ++column) {
      const int64_t j = j0 + first_column() + column / 2 * 8 + column % 2;
      const float r_norm = j < r.x.rows ? r.norm[j] : 0.0f;
      KDK_UNROLL
      for (int row = 0; row < 8; ++row) {
        const int64_t i = i0 + first_row() + 8 * row;
        const float x_norm = i < x.x.rows ? x.norm[i] : 0.0f;
        const bool pair = i < x.x.rows && j < r.x.rows && !(p.in_batch && p.first + i == j);
        f(row, column, x_norm, r_norm, pair);
      }
    }
  };
  constexpr Along kAlong = Along::kContraction;
  Accumulators acc;
  fill(acc, 0);
  multiply<kMath, kAlong, kAlong>(acc, shared_memory(), x.x, r.x, 0, i0, j0, 0, x.x.cols);
  bool near = false;
  squares([&](int row, int column, float x_norm, float r_norm, bool pair) {
    float& d2 = acc[row / 2][column / 2][row % 2 * 2 + column % 2];
    // in this order, so that nothing is rounded to the digits of the sum of the norms
    d2 = (x_norm - d2) + (r_norm - d2);
    near = near || (pair && d2 < (x_norm + r_norm) * kClose<float>);
  });
  near = any_of(near, shared_memory());
  if (near) {
    if (threadIdx.x == 0) count_differences(kTile * kTile);
    fill(acc, 0);
    multiply<Math::kIeee, kAlong, kAlong, Terms::kSquaredDifferences>(
        acc, shared_memory(), x.given, r.given, 0, i0, j0, 0, x.x.cols);
    squares([&](int row, int column, float x_norm, float r_norm, bool) {
      // a norm that is NaN makes it so
      acc[row / 2][column / 2][row % 2 * 2 + column % 2] += 0 * (x_norm + r_norm);
    });
  }
  if (threadIdx.x == 0) p.close[i0 / kTile * across + j0 / kTile] = near;
  auto* tile = reinterpret_cast<float*>(shared_memory());
  stage(acc, tile);
  const int64_t rows = x.x.rows - i0, columns = r.x.rows - j0;
  for_each_eight(tile, rows, columns, [&](float (&d)[8], int row, int column) {
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) d[e] = pairs::from_squared<float>(d[e] < 0 ? 0 : d[e], p.distance);
    store_eight(p.d + (i0 + row) * p.stride + j0 + column, d, columns - column, true);
  });
}

// A block has a tile of rows and kColumns of their columns, and goes through the rows that
// contribute to their gradient kSteps at a time. A thread has 4 x 4 entries.
constexpr int kColumns = 32, kSteps = 16;
static_assert(kTile / 4 * (kColumns / 4) == kThreads);
constexpr int kGroups = kThreads / 32;  // of rows, in sums of 32 columns

struct CloseShared {
  Float4 weights[kSteps][kTile / 4 + 1];
  Float4 other[kSteps][kColumns / 4];
};

__device__ __forceinline__ Float4 load_four(const Source& x, int64_t i, int64_t d) {
  const auto* row = static_cast<const float*>(x.data) + i * x.stride + d;
  return i < x.rows && d < x.stride ? *reinterpret_cast<const Float4*>(row) : Float4{};
}

__device__ void subtract_close(const CloseParams& p, int64_t block) {
  auto& shared = *reinterpret_cast<CloseShared*>(shared_memory());
  const DistancesParams& chunk = p.chunk;
  const Rows& rows = p.references ? chunk.references : chunk.anchors;
  const Rows& other = p.references ? chunk.anchors : chunk.references;
  const int64_t N = rows.x.rows, K = other.x.rows, D = rows.x.cols;
  const int64_t across = ceil_div(chunk.references.x.rows, kTile), slabs = ceil_div(D, kColumns);
  const int64_t n0 = block / slabs * kTile, d0 = block % slabs * kColumns;
  const int64_t n = threadIdx.x / (kColumns / 4) * 4, d = threadIdx.x % (kColumns / 4) * 4;
  Float4 x[4], acc[4] = {};
  KDK_UNROLL
  for (int a = 0; a < 4; ++a) x[a] = load_four(rows.given, n0 + n + a, d0 + d);
  bool any = false;
  for (int64_t tile = 0; tile * kTile < K; ++tile) {
    const int64_t at = p.references ? tile * across + n0 / kTile : n0 / kTile * across + tile;
    if (!chunk.close[at]) continue;
    any = true;
    const int64_t end = (tile + 1) * kTile < K ? (tile + 1) * kTile : K;
    for (int64_t k0 = tile * kTile; k0 < end; k0 += kSteps) {
      for (int c = threadIdx.x; c < kSteps * kTile; c += kThreads) {
        // neighbours in memory are neighbouring threads
        const int row = p.references ? c % kTile : c / kSteps,
                  step = p.references ? c / kTile : c % kSteps;
        const int64_t i = p.references ? k0 + step : n0 + row,
                      j = p.references ? n0 + row : k0 + step;
        const bool there = n0 + row < N && k0 + step < end;
        shared.weights[step][row / 4].x[row % 4] = there ? chunk.d[i * chunk.stride + j] : 0.0f;
      }
      if (threadIdx.x < kSteps * kColumns / 4) {
        const int step = threadIdx.x / (kColumns / 4), four = threadIdx.x % (kColumns / 4);
        shared.other[step][four] = load_four(other.given, k0 + step, d0 + 4 * four);
      }
      __syncthreads();
      for (int step = 0; step < kSteps; ++step) {
        const Float4 w = shared.weights[step][n / 4], y = shared.other[step][d / 4];
        KDK_UNROLL
        for (int a = 0; a < 4; ++a) {
          KDK_UNROLL
          for (int b = 0; b < 4; ++b) acc[a].x[b] += w.x[a] * (x[a].x[b] - y.x[b]);
        }
      }
      __syncthreads();
    }
  }
  if (!any) return;
  KDK_UNROLL
  for (int a = 0; a < 4; ++a) {
    KDK_UNROLL
    for (int b = 0; b < 4; ++b) {
      if (n0 + n + a < N && d0 + d + b < D)
        rows.weighted[(n0 + n + a) * D + d0 + d + b] -= acc[a].x[b];
    }
  }
}

// Adds the weights of 32 references to their sums.
__device__ void sum_columns(const CloseParams& p, int64_t block) {
  auto* shared = reinterpret_cast<double*>(shared_memory());  // [kGroups, 32]
  const DistancesParams& chunk = p.chunk;
  const int64_t j = block * 32 + threadIdx.x % 32;
  double sum = 0;
  for (int64_t i = threadIdx.x / 32; j < chunk.references.x.rows && i < chunk.anchors.x.rows;
       i += kGroups)
    sum += p.weights[i * chunk.stride + j];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || j >= chunk.references.x.rows) return;
  double total = 0;
  for (int group = 0; group < kGroups; ++group) total += shared[group * 32 + threadIdx.x];
  chunk.references.sums[j] += total;
}

int64_t close_blocks(const CloseParams& p) {
  const Source& x = p.references ? p.chunk.references.x : p.chunk.anchors.x;
  return ceil_div(x.rows, kTile) * ceil_div(x.cols, kColumns);
}

__global__ void __launch_bounds__(kThreads, 2)
    triplet_all_close_kernel(const __grid_constant__ CloseParams p) {
  const int64_t tiles =
      ceil_div((p.references ? p.chunk.references : p.chunk.anchors).x.rows, kTile);
  const int64_t blocks = tiles * ceil_div(p.chunk.anchors.x.cols, kColumns);
  if (blockIdx.x < blocks) return subtract_close(p, blockIdx.x);
  sum_columns(p, blockIdx.x - blocks);
}

__global__ void __launch_bounds__(kThreads)
    triplet_all_gradient_kernel(const __grid_constant__ GradientParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t D = p.rows.x.cols;
  if (i >= p.rows.x.rows) return;
  const auto* x = static_cast<const float*>(p.rows.x.data) + i * p.rows.x.stride;
  const double sum = p.rows.sums[i];
  for (int64_t d = threadIdx.x % 32; d < D; d += 32)
    p.dx[p.rows.order[i] * D + d] = static_cast<float>(sum * x[d] - p.rows.weighted[i * D + d]);
}

}  // namespace

void launch_triplet_all_prepare(const PrepareParams& params, Math math, cudaStream_t stream) {
  const auto kernel = math == Math::kBFloat16  ? triplet_all_prepare_kernel<bf16_t>
                      : math == Math::kFloat16 ? triplet_all_prepare_kernel<fp16_t>
                                               : triplet_all_prepare_kernel<float>;
  launch(kernel, grid_of(ceil_div(params.from.rows, kRowsPerBlock)), kThreads, 0, stream, params);
}

void launch_triplet_all_distances(const DistancesParams& params, Math math, cudaStream_t stream) {
  const int64_t tiles =
      ceil_div(params.anchors.x.rows, kTile) * ceil_div(params.references.x.rows, kTile);
  launch(math == Math::kIeee ? triplet_all_product_kernel<Math::kIeee>
                             : triplet_all_product_kernel<Math::kTf32x3>,
         grid_of(tiles), kThreads, kSharedBytes, stream, params);
}

void launch_triplet_all_close(const CloseParams& params, cudaStream_t stream) {
  const int64_t columns = params.references ? ceil_div(params.chunk.references.x.rows, 32) : 0;
  launch(triplet_all_close_kernel, grid_of(close_blocks(params) + columns), kThreads,
         sizeof(CloseShared), stream, params);
}

void launch_triplet_all_gradient(const GradientParams& params, cudaStream_t stream) {
  launch(triplet_all_gradient_kernel, grid_of(ceil_div(params.rows.x.rows, kRowsPerBlock)),
         kThreads, 0, stream, params);
}

}  // namespace kdk::triplet_all
