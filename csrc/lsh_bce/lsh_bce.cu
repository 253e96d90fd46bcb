// SPDX-License-Identifier: Apache-2.0
// Projections leave their tile as bits, as losses, or as derivatives that a second product reads
// while they are in the L2 cache.
#include "../common/cuda/launch.h"
#include "../common/cuda/main_loop.h"
#include "../common/cuda/reduce.h"
#include "../common/cuda/semaphores.h"
#include "lsh_bce_cuda.h"
#include "lsh_bce_math.h"

namespace kdk::lsh_bce {
namespace {

using namespace kdk::cuda;

struct TilePlace {
  int64_t m0, n0, i, j;  // first row and column; number of the tile down and across
};

__device__ __forceinline__ TilePlace place(const CudaProjection& p) {
  const auto down = static_cast<unsigned>(ceil_div(p.features.rows, kTile));
  const int64_t i = blockIdx.x % down, j = blockIdx.x / down;
  return {i * kTile, j * kTile, i, j};
}

// Multiplies the tile x w^T.
template <Math kMath>
__device__ __forceinline__ void project(Accumulators& acc, unsigned char* shared,
                                        const CudaProjection& p, const TilePlace& tile) {
  fill(acc, 0);
  multiply<kMath, Along::kContraction, Along::kContraction>(acc, shared, p.features, p.weight, 0,
                                                            tile.m0, tile.n0, 0, p.features.cols);
}

template <Math kMath>
__device__ __forceinline__ float bias(const CudaProjection& p, int64_t n) {
  if (p.bias == nullptr || n >= p.weight.rows) return 0.0f;
  return to_float(static_cast<const Element<kMath>*>(p.bias)[n * p.bias_stride]);
}

// Spreads 4 bits, so that a zero follows each.
__device__ __forceinline__ unsigned spread(unsigned x) {
  x = (x | x << 2) & 0x33;
  return (x | x << 1) & 0x55;
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    lsh_bce_encode_kernel(const __grid_constant__ EncodeParams p) {
  const auto tile = place(p.projection);
  Accumulators z;
  project<kMath>(z, shared_memory(), p.projection, tile);
  const int64_t B = p.projection.features.rows, N = p.projection.weight.rows;
  const int64_t width = ceil_div(N, 8);
  const int lane = threadIdx.x % 32;
  // lane 4 g + t votes on columns 2 t and 2 t + 1 of row g: bits 4 g ... 4 g + 3 of the two votes
  // are a byte's even and odd bits. Lane t of the row keeps byte t of the warp's four.
  float shift[4][2];
  KDK_UNROLL
  for (int j = 0; j < 8; ++j)
    shift[j / 2][j % 2] = bias<kMath>(p.projection, tile.n0 + first_column() + j / 2 * 8 + j % 2);
  KDK_UNROLL
  for (int i = 0; i < 8; ++i) {
    unsigned code = 0;
    KDK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t n = tile.n0 + first_column() + 8 * j;
      const unsigned even = __ballot_sync(kWarp, n < N && z[i / 2][j][i % 2 * 2] + shift[j][0] > 0);
      const unsigned odd =
          __ballot_sync(kWarp, n + 1 < N && z[i / 2][j][i % 2 * 2 + 1] + shift[j][1] > 0);
      const int row_bits = lane / 4 * 4;
      const unsigned byte = spread(even >> row_bits & 15) | spread(odd >> row_bits & 15) << 1;
      if (lane % 4 == j) code = byte;
    }
    const int64_t row = tile.m0 + first_row() + 8 * i;
    const int64_t byte = (tile.n0 + first_column() - lane % 4 * 2) / 8 + lane % 4;
    if (row < B && byte < width) p.codes[row * width + byte] = static_cast<uint8_t>(code);
  }
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    lsh_bce_project_kernel(const __grid_constant__ ProjectParams p) {
  using T = Element<kMath>;
  clear_semaphores(p.semaphores, p.semaphore_count);
  const auto tile = place(p.projection);
  const Source& features = p.projection.features;
  const int64_t B = features.rows, N = p.projection.weight.rows;
  auto* shared = reinterpret_cast<float*>(shared_memory());
  {
    Accumulators acc;
    project<kMath>(acc, shared_memory(), p.projection, tile);
    stage(acc, shared);
  }
  // Sixteen threads have a row, eight neighbouring directions each: a byte of its code.
  constexpr int kAcross = kTile / 8, kDown = kThreads / kAcross;
  const int column = threadIdx.x % kAcross * 8;
  const int64_t n = tile.n0 + column, left = N - n;
  float shift[8], columns[8] = {};
  KDK_UNROLL
  for (int e = 0; e < 8; ++e) shift[e] = bias<kMath>(p.projection, n + e);
  for (int row = threadIdx.x / kAcross; row < kTile; row += kDown) {
    const int64_t b = tile.m0 + row;
    const bool counts =
        b < B && (features.keep == nullptr || features.keep[b * features.keep_stride]);
    const float factor = counts && p.factor ? p.factor[b * p.factor_stride] : 1.0f;
    const unsigned code =
        counts && left > 0 ? p.codes[b * p.codes_stride_b + n / 8 * p.codes_stride_n] : 0u;
    float z[8], loss = 0;
    load_eight(z, shared, row, column);
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) {
      const float x = z[e] + shift[e], y = static_cast<float>(code >> e & 1);
      const float magnitude = exp_minus<float, float, int32_t>(x < 0 ? -x : x);
      const bool valid = counts && e < left;
      loss += valid ? cross_entropy<float>(x, y, magnitude) : 0.0f;
      z[e] = valid ? factor * slope<float>(x, y, magnitude) : 0.0f;
      columns[e] += z[e];
    }
    if (p.dz != nullptr && b < B && left > 0)
      store_eight(static_cast<T*>(p.dz) + b * N + n, z, left, N % 8 == 0);
    loss = lane_sum<1, kAcross / 2>(loss);
    if (p.loss != nullptr && column == 0 && b < B) p.loss[tile.j * p.loss_stride + b] = loss;
  }
  if (p.dbias == nullptr) return;
  __syncthreads();
  KDK_UNROLL
  for (int e = 0; e < 8; ++e) shared[threadIdx.x / kAcross * kTile + column + e] = columns[e];
  __syncthreads();
  if (threadIdx.x >= kTile || tile.n0 + threadIdx.x >= N) return;
  float sum = 0;
  for (int down = 0; down < kDown; ++down) sum += shared[down * kTile + threadIdx.x];
  p.dbias[tile.i * N + tile.n0 + threadIdx.x] = sum;
}

int64_t tiles(const CudaProjection& p) {
  return ceil_div(p.features.rows, kTile) * ceil_div(p.weight.rows, kTile);
}

}  // namespace

void launch_lsh_bce_encode(const EncodeParams& params, Math math, cudaStream_t stream) {
  for_math(math, [&]<Math kMath>() {
    launch(lsh_bce_encode_kernel<kMath>, grid_of(tiles(params.projection)), kThreads, kSharedBytes,
           stream, params);
  });
}

void launch_lsh_bce_project(const ProjectParams& params, Math math, cudaStream_t stream) {
  for_math(math, [&]<Math kMath>() {
    launch(lsh_bce_project_kernel<kMath>, grid_of(tiles(params.projection)), kThreads, kSharedBytes,
           stream, params);
  });
}

}  // namespace kdk::lsh_bce
