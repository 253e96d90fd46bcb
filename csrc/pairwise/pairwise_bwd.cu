// SPDX-License-Identifier: Apache-2.0
// The gradient of rows comes from tiles of weights. One kernel makes the weights of some rows at a
// time, and a product reads them while they are in the L2 cache. For distances, a second kernel
// finishes the gradient from that product.
#include "../common/cuda/launch.h"
#include "../common/cuda/rows.h"
#include "../common/cuda/semaphores.h"
#include "../common/cuda/tile.h"
#include "pairwise_cuda.h"

namespace kdk::pairwise {
namespace {

using namespace kdk::cuda;

constexpr int kPitch = kPiece + 1;               // of a piece in shared memory
constexpr int kLines = kThreads / (kPiece / 8);  // eight threads have a line of a piece
constexpr int kEach = kPiece / kLines;           // lines of a thread
constexpr int kGradientColumns = 32 * 8;         // of a warp

// The contribution of row y_j to the gradient of row x_i: w of dx = w (x - y), or of dx = w y.
struct Weight {
  float w;
  bool close;
};

// Returns the weight of a pair, from the incoming gradient and the value. PairsParams explains
// `bound` and `other`.
__device__ __forceinline__ Weight weight_of(const PairsParams& p, float gradient, float value,
                                            float bound, float other, bool itself) {
  if (p.metric == Metric::kDot) return {gradient, false};
  if (p.metric == Metric::kCosine) return {gradient * other, false};
  // a slope may be infinite where the gradient is 0
  if (itself || gradient == 0) return {0, false};
  const float w = gradient * slope(p.metric, value, -2 * p.gamma);
  return {w, w != 0 && is_close(p.metric, value, bound, other)};
}

// A piece of a matrix: 64 x 64 numbers, of which each thread has 16. They are read along whichever
// axis is contiguous.
template <typename T>
class Piece {
 public:
  __device__ __forceinline__ Piece(const Strided& matrix, int64_t g, int64_t i0, int64_t j0,
                                   int64_t rows, int64_t cols)
      : transposed_(matrix.row == 1 && matrix.column != 1) {
    const int64_t line_stride = transposed_ ? matrix.column : matrix.row;
    const int64_t step = transposed_ ? matrix.row : matrix.column;
    const int64_t lines = transposed_ ? cols - j0 : rows - i0;
    const int64_t length = transposed_ ? rows - i0 : cols - j0;
    const T* from = static_cast<const T*>(matrix.data) + g * matrix.group + i0 * matrix.row +
                    j0 * matrix.column;
    KDK_UNROLL
    for (int k = 0; k < kEach; ++k) {
      const int64_t count = line(k) < lines ? length - along() : 0;
      const T* at = from + line(k) * line_stride + along() * step;
      if (step == 1) {
        read_eight(x_[k], at, count, matrix.aligned);
      } else {
        KDK_UNROLL
        for (int e = 0; e < 8; ++e) x_[k][e] = e < count ? to_float(at[e * step]) : 0.0f;
      }
    }
  }

  // to[i][j] = what was read, or += it
  __device__ __forceinline__ void put(float* to, bool add) const {
    KDK_UNROLL
    for (int k = 0; k < kEach; ++k) {
      KDK_UNROLL
      for (int e = 0; e < 8; ++e) {
        const int i = transposed_ ? along() + e : line(k), j = transposed_ ? line(k) : along() + e;
        float& x = to[i * kPitch + j];
        x = add ? x + x_[k][e] : x_[k][e];
      }
    }
  }

 private:
  static __device__ __forceinline__ int line(int k) {
    return static_cast<int>(threadIdx.x) / (kPiece / 8) + k * kLines;
  }
  static __device__ __forceinline__ int along() { return threadIdx.x % (kPiece / 8) * 8; }

  bool transposed_;
  float x_[kEach][8];
};

template <typename T, typename W>
__global__ void __launch_bounds__(kThreads)
    pairwise_bwd_kernel_weights(const __grid_constant__ WeightsParams params) {
  const PairsParams& p = params.pairs;
  const int64_t pieces = ceil_div(p.cols, kPiece), g = blockIdx.z;
  const int64_t piece = blockIdx.x % pieces;
  const int64_t i0 = blockIdx.x / pieces * kPiece, j0 = piece * kPiece, all0 = p.first + i0;
  const int64_t end = p.first + p.rows;
  clear_semaphores(params.semaphores, params.semaphore_count);
  auto* gradients = reinterpret_cast<float*>(shared_memory());
  float* values = gradients + kPiece * kPitch;
  const bool distance = is_distance(p.metric);
  {
    // all of what a block reads is under way before the first of it is used
    const Piece<T> forth(p.dout, g, all0, j0, end, p.cols);
    const Piece<T> back(p.dout.transposed(), g, all0, j0, p.in_batch ? end : 0, p.cols);
    const Piece<T> of_values(p.values, g, all0, j0, distance ? end : 0, p.cols);
    forth.put(gradients, false);
    of_values.put(values, false);
    __syncthreads();
    if (p.in_batch) back.put(gradients, true);
    __syncthreads();
  }
  const int column = threadIdx.x % (kPiece / 8) * 8;
  const int64_t left = p.cols - j0 - column;
  float other[8];
  KDK_UNROLL
  for (int e = 0; e < 8; ++e)
    other[e] =
        e < left && p.metric != Metric::kDot ? p.other_number[g * p.cols + j0 + column + e] : 0.0f;
  KDK_UNROLL
  for (int k = 0; k < kEach; ++k) {
    const int row = threadIdx.x / (kPiece / 8) + k * kLines;
    const bool inside = all0 + row < end;
    const float bound = inside && distance ? p.number[g * p.all_rows + all0 + row] : 0.0f;
    float w[8], sum = 0;
    int close = 0;
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int at = row * kPitch + column + e;
      const bool itself = p.in_batch && all0 + row == j0 + column + e;
      const Weight weight = weight_of(p, gradients[at], values[at], bound, other[e], itself);
      // rounded as the product takes it, so that sum and product go together
      w[e] = weight.close ? 0.0f : to_float(from_float<W>(weight.w));
      sum += w[e];
      close |= weight.close;
    }
    const int64_t out = (g * p.rows + i0 + row) * p.cols + j0 + column;
    if (inside && left > 0)
      store_eight(static_cast<W*>(params.weights) + out, w, left, p.cols % 8 == 0);
    if (!distance) continue;
    sum = lane_sum<1, kPiece / 16>(sum);
    close = lane_sum<1, kPiece / 16>(close);
    if (inside && column == 0) {
      p.sums[(g * pieces + piece) * p.rows + i0 + row] = sum;
      p.close[(g * pieces + piece) * p.rows + i0 + row] = close > 0;
    }
  }
}

// A warp has a row and some of its columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pairwise_bwd_kernel_gradient(const __grid_constant__ GradientParams params) {
  const PairsParams& p = params.pairs;
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t g = blockIdx.z, lane = threadIdx.x % 32, D = params.x.cols;
  if (local >= p.rows) return;
  const int64_t i = p.first + local, pieces = ceil_div(p.cols, kPiece);
  const int64_t d = static_cast<int64_t>(blockIdx.y) * kGradientColumns + lane * 8, left = D - d;
  double total = 0;
  for (int64_t piece = lane; piece < pieces; piece += 32)
    total += p.sums[(g * pieces + piece) * p.rows + local];
  total = warp_sum(total);
  float x[8], dx[8];
  read_eight(x, row_of<T>(params.moved, g, i) + d, left, params.moved.aligned);
  read_eight(dx, params.product + (g * p.rows + local) * D + d, left, D % 4 == 0);
  KDK_UNROLL
  for (int e = 0; e < 8; ++e) dx[e] = static_cast<float>(total * static_cast<double>(x[e]) - dx[e]);

  read_eight(x, row_of<T>(params.x, g, i) + d, left, params.x.aligned);
  const auto entry = [&](const Strided& matrix, int64_t row, int64_t column) {
    return to_float(static_cast<const T*>(
        matrix.data)[g * matrix.group + row * matrix.row + column * matrix.column]);
  };
  const float bound = p.number[g * p.all_rows + i];
  for (int64_t first = 0; first < pieces; first += 32) {
    const int64_t mine = first + lane;
    const bool any = mine < pieces && p.close[(g * pieces + mine) * p.rows + local];
    for (unsigned some = __ballot_sync(kWarp, any); some != 0; some &= some - 1) {
      const int64_t j0 = (first + lowest_bit(some)) * kPiece;
      for (int64_t j1 = j0; j1 < j0 + kPiece; j1 += 32) {
        Weight weight{0, false};
        const int64_t j = j1 + lane;
        if (j < p.cols) {
          const float back = p.in_batch ? entry(p.dout, j, i) : 0.0f;
          weight = weight_of(p, entry(p.dout, i, j) + back, entry(p.values, i, j), bound,
                             p.other_number[g * p.cols + j], p.in_batch && i == j);
        }
        for (unsigned close = __ballot_sync(kWarp, weight.close); close != 0; close &= close - 1) {
          const int which = lowest_bit(close);
          const float w = __shfl_sync(kWarp, weight.w, which);
          float y[8];
          read_eight(y, row_of<T>(params.y, g, j1 + which) + d, left, params.y.aligned);
          KDK_UNROLL
          for (int e = 0; e < 8; ++e) dx[e] += w * (x[e] - y[e]);
        }
      }
    }
  }
  if (left > 0)
    store_eight(static_cast<T*>(params.dx) + (g * p.all_rows + i) * D + d, dx, left, D % 8 == 0);
}

}  // namespace

void launch_pairwise_bwd_weights(const WeightsParams& params, Math math, cudaStream_t stream) {
  const PairsParams& p = params.pairs;
  const dim3 grid = grid_of(ceil_div(p.rows, kPiece) * ceil_div(p.cols, kPiece), 1, p.groups);
  const auto kernel = math == Math::kBFloat16  ? pairwise_bwd_kernel_weights<bf16_t, bf16_t>
                      : math == Math::kFloat16 ? pairwise_bwd_kernel_weights<fp16_t, float>
                                               : pairwise_bwd_kernel_weights<float, float>;
  launch(kernel, grid, kThreads, 2 * kPiece * kPitch * sizeof(float), stream, params);
}

void launch_pairwise_bwd_gradient(const GradientParams& params, Math math, cudaStream_t stream) {
  const PairsParams& p = params.pairs;
  const dim3 grid =
      grid_of(ceil_div(p.rows, kRowsPerBlock), ceil_div(params.x.cols, kGradientColumns), p.groups);
  const auto kernel = math == Math::kBFloat16  ? pairwise_bwd_kernel_gradient<bf16_t>
                      : math == Math::kFloat16 ? pairwise_bwd_kernel_gradient<fp16_t>
                                               : pairwise_bwd_kernel_gradient<float>;
  launch(kernel, grid, kThreads, 0, stream, params);
}

}  // namespace kdk::pairwise
