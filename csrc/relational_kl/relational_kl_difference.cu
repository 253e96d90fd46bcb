// SPDX-License-Identifier: Apache-2.0
// This kernel makes the student's gradient. The weights of both sides are read from the L2 cache
// and become the difference of the softmaxes in shared memory; each thread combines what it copied
// itself.
#include "../common/cuda/launch.h"
#include "../common/cuda/product_tile.h"
#include "relational_kl_device.h"

namespace kdk::relational_kl {
namespace {

template <Math kMath>
class DifferenceLoader {
 public:
  using Tile = OperandTile<kMath, Along::kContraction>;
  using T = typename Tile::T;
  static constexpr int kBytes = 2 * kTileBytes;
  // Registers for both the maximum and the sum: beside weights of 16 bits the rounding of a
  // log-sum-exp, which is common to a row, is nothing.
  static constexpr bool kExact = sizeof(T) == 4;

  __device__ __forceinline__ DifferenceLoader(const DifferenceParams& p, int64_t query0, int64_t k0)
      : p_(p), load_k_(k0), finish_k_(k0), teacher_(p.teacher) {
    KDK_UNROLL
    for (int c = 0; c < Tile::kCopies; ++c) {
      const int64_t query = query0 + Tile::row(c);
      there_[c] = query < p.product.M;
      const int64_t i = there_[c] ? query : 0;
      row_[c] = teacher_ ? i / kGroup * 2 * kGroup + i % kGroup : i;
      for (int side = 0; side < 2; ++side) {
        const float max = p.softmax[2 * side * p.product.M + i],
                    inverse = p.softmax[(2 * side + 1) * p.product.M + i];
        if constexpr (kExact) {
          shift_[c][side] = max;
          inverse_[c][side] = inverse;
        } else {
          shift_[c][side] = max - std::log(inverse);
        }
      }
    }
  }

  __device__ __forceinline__ void load(unsigned char* stage, int64_t k_end) {
    const auto* weights = static_cast<const T*>(p_.weights);
    KDK_UNROLL
    for (int c = 0; c < Tile::kCopies; ++c) {
      const int64_t k = load_k_ + Tile::column(c), left = there_[c] ? k_end - k : 0;
      const int count = left <= 0                ? 0
                        : left < Tile::kPerChunk ? static_cast<int>(left)
                                                 : Tile::kPerChunk;
      const T* from = weights + row_[c] * p_.stride + k;
      Tile::copy(Tile::place(stage, c), from, count, true);
      if (teacher_)
        Tile::copy(Tile::place(stage + kTileBytes, c), from + kGroup * p_.stride, count, true);
      if (load_k_ % kTile != 0) continue;
      // long before they are needed
      const float* maxima = p_.maxima + load_k_ / kTile * p_.rows + row_[c];
      most_[c][0] = maxima[0];
      most_[c][1] = teacher_ ? maxima[kGroup] : 0.0f;
    }
    load_k_ += Tile::kStep;
  }

  __device__ __forceinline__ void finish(unsigned char* stage) {
    KDK_UNROLL
    for (int c = 0; c < Tile::kCopies; ++c) {
      if (finish_k_ % kTile == 0) {
        KDK_UNROLL
        for (int side = 0; side < 2; ++side) {
          factor_[c][side] = softmax_exp(most_[c][side] - shift_[c][side]);
          if constexpr (kExact) factor_[c][side] *= inverse_[c][side];
        }
      }
      auto& student = *reinterpret_cast<Chunk<T>*>(Tile::place(stage, c));
      auto weights = student;
      if (teacher_) {
        const auto other = *reinterpret_cast<const Chunk<T>*>(Tile::place(stage + kTileBytes, c));
        KDK_UNROLL
        for (int e = 0; e < Tile::kPerChunk; ++e)
          weights.x[e] = from_float<T>(factor_[c][0] * to_float(weights.x[e]) -
                                       factor_[c][1] * to_float(other.x[e]));
      } else {
        KDK_UNROLL
        for (int e = 0; e < Tile::kPerChunk; ++e)
          weights.x[e] = from_float<T>(factor_[c][0] * to_float(weights.x[e]));
      }
      student = weights;
    }
    finish_k_ += Tile::kStep;
  }

 private:
  const DifferenceParams& p_;
  int64_t load_k_, finish_k_;
  bool teacher_, there_[Tile::kCopies];
  int64_t row_[Tile::kCopies];
  float shift_[Tile::kCopies][2], inverse_[kExact ? Tile::kCopies : 1][2];
  float most_[Tile::kCopies][2], factor_[Tile::kCopies][2];
};

// Takes the positive key of each row away; of a row without one everything is NaN.
template <typename T>
__device__ void subtract_positives(Accumulators& acc, const DifferenceParams& p, int64_t m0,
                                   int64_t n0) {
  const ProductParams& product = p.product;
  const int64_t counting = counting_keys(product.counting, product.K);
  KDK_UNROLL
  for (int h = 0; h < 8; ++h) {
    const int64_t row = m0 + first_row() + 8 * h;
    if (row >= product.M) continue;
    const int64_t k = p.positives[row];
    const bool counts = k >= 0 && k < counting;
    const T* key = static_cast<const T*>(product.b.data) + (counts ? k * product.b.stride : 0);
    const float factor = !counts ? __builtin_nanf("") : p.scale ? p.scale[k] : 1.0f;
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int64_t column = n0 + first_column() + e / 2 * 8 + e % 2;
      if (column < product.N) entry(acc, h, e) -= factor * to_float(key[column]);
    }
  }
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    relational_kl_difference_product_kernel(const __grid_constant__ DifferenceParams p) {
  const ProductParams& product = p.product;
  const int64_t down = ceil_div(product.M, kTile);
  const int64_t m0 = blockIdx.x % down * kTile, n0 = blockIdx.x / down * kTile;
  const int64_t k0 = blockIdx.y * product.split_length, k_end = end_of_split(product);
  Accumulators acc;
  fill(acc, 0);
  DifferenceLoader<kMath> weights(p, m0, k0);
  typename OperandTile<kMath, Along::kOutput>::Loader keys(product.b, 0, n0, k0);
  multiply_loaded<kMath, Along::kContraction, Along::kOutput>(acc, shared_memory(), weights, keys,
                                                              steps_of<kMath>(k0, k_end), k_end);
  if (p.positives != nullptr && blockIdx.y == 0) subtract_positives<Element<kMath>>(acc, p, m0, n0);
  auto* part = static_cast<float*>(product.out) + blockIdx.y * product.M * product.N;
  auto* tile = reinterpret_cast<float*>(shared_memory());
  stage(acc, tile);
  store_tile(tile, part, nullptr, product, m0, n0, 1.0f);
}

}  // namespace

void launch_relational_kl_difference(const DifferenceParams& params, Math math,
                                     cudaStream_t stream) {
  for_wide_math(math, [&]<Math kMath>() {
    launch(relational_kl_difference_product_kernel<kMath>,
           grid_of(params.product.tiles, params.product.splits), kThreads,
           kStages * (DifferenceLoader<kMath>::kBytes + kTileBytes), stream, params);
  });
}

}  // namespace kdk::relational_kl
