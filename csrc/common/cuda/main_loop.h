// SPDX-License-Identifier: Apache-2.0
// This is the main loop of a product. A block makes a tile of a b^T in registers, and the steps of
// the contraction are copied kStages - 1 ahead. Of its eight warps, two stand below one another and
// four side by side, and each has 64 x 32 of the tile.
#pragma once

#include "tile.h"

namespace kdk::cuda {

inline constexpr int kStages = 4;
inline constexpr int kSharedBytes = kStages * 2 * kTileBytes;
// What a block may have on every GPU of compute capability 8.0 or later. Where a kernel takes more,
// its launch or kdkernels/cuda/<op>.py asks the device for what it has.
inline constexpr int kEverywhereBytes = 99 << 10;
static_assert(kSharedBytes <= kEverywhereBytes);
inline constexpr int kWarpsAcross = 4;
inline constexpr int kWarpRows = 64, kWarpColumns = 32;

// Blocks on a multiprocessor, which caps the registers of a thread: at 128 for two. Two are what
// shared memory of sm_80 has room for; fp32 operands need the registers of one.
template <Math kMath>
inline constexpr int kBlocks = sizeof(Element<kMath>) == 2 ? 2 : 1;
static_assert(2 * kSharedBytes <= 163 << 10, "two blocks have to fit a multiprocessor of sm_80");

// A thread's part of the tile: [i][j][c] is at row first_row() + 16 i + 8 (c / 2) and column
// first_column() + 8 j + c % 2.
using Accumulators = float[4][4][4];

__device__ __forceinline__ int first_row() {
  return static_cast<int>(threadIdx.x) / 32 / kWarpsAcross * kWarpRows + threadIdx.x % 32 / 4;
}

__device__ __forceinline__ int first_column() {
  return static_cast<int>(threadIdx.x) / 32 % kWarpsAcross * kWarpColumns + threadIdx.x % 4 * 2;
}

// Calls f(i, j, c, row, column) for every accumulator of this thread.
template <typename F>
__device__ __forceinline__ void for_each_accumulator(const F& f) {
  KDK_UNROLL
  for (int i = 0; i < 4; ++i) {
    KDK_UNROLL
    for (int j = 0; j < 4; ++j) {
      KDK_UNROLL
      for (int c = 0; c < 4; ++c)
        f(i, j, c, first_row() + 16 * i + c / 2 * 8, first_column() + 8 * j + c % 2);
    }
  }
}

__device__ __forceinline__ void fill(Accumulators& acc, float value) {
  for_each_accumulator([&](int i, int j, int c, int, int) { acc[i][j][c] = value; });
}

// Splits fp32 registers into two pieces of tf32.
template <int kCount>
__device__ __forceinline__ void split(const uint32_t (&x)[kCount], uint32_t (&high)[kCount],
                                      uint32_t (&low)[kCount]) {
  KDK_UNROLL
  for (int r = 0; r < kCount; ++r) {
    high[r] = to_tf32(float_of(x[r]));
    low[r] = to_tf32(float_of(x[r]) - float_of(high[r]));
  }
}

// What a step of the contraction adds. Squared differences are taken of fp32 operands only.
enum class Terms { kProducts, kSquaredDifferences };

template <Math kMath, Along kA, Along kB, Terms kTerms = Terms::kProducts>
__device__ __forceinline__ void multiply_step(Accumulators& acc, const unsigned char* a_tile,
                                              const unsigned char* b_tile) {
  using A = OperandTile<kMath, kA>;
  using B = OperandTile<kMath, kB>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m = warp / kWarpsAcross * kWarpRows, n = warp % kWarpsAcross * kWarpColumns;
  if constexpr (kMath == Math::kIeee) {
    for (int k = 0; k < A::kStep; k += 4) {
      Float4 a[8];
      KDK_UNROLL
      for (int i = 0; i < 8; ++i) a[i] = A::load_four(a_tile, m + lane / 4 + 8 * i, k);
      KDK_UNROLL
      for (int j = 0; j < 8; ++j) {
        const Float4 b = B::load_four(b_tile, n + lane % 4 * 2 + j / 2 * 8 + j % 2, k);
        KDK_UNROLL
        for (int i = 0; i < 8; ++i) {
          KDK_UNROLL
          for (int e = 0; e < 4; ++e) {
            const float x = kTerms == Terms::kProducts ? a[i].x[e] : a[i].x[e] - b.x[e];
            acc[i / 2][j / 2][i % 2 * 2 + j % 2] += x * (kTerms == Terms::kProducts ? b.x[e] : x);
          }
        }
      }
    }
  } else {
    static_assert(kTerms == Terms::kProducts);
    KDK_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t b[4][2];
      KDK_UNROLL
      for (int j = 0; j < 4; j += 2) B::load_b(b + j, b_tile, n + 8 * j, half);
      KDK_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        A::load_a(a, a_tile, m + 16 * i, half);
        if constexpr (kMath == Math::kTf32x3) {
          uint32_t a_high[4], a_low[4];
          split(a, a_high, a_low);
          KDK_UNROLL
          for (int j = 0; j < 4; ++j) {
            uint32_t b_high[2], b_low[2];
            split(b[j], b_high, b_low);
            mma<kMath>(acc[i][j], a_low, b_high);
            mma<kMath>(acc[i][j], a_high, b_low);
            mma<kMath>(acc[i][j], a_high, b_high);
          }
        } else {
          KDK_UNROLL
          for (int j = 0; j < 4; ++j) mma<kMath>(acc[i][j], a, b[j]);
        }
      }
    }
  }
}

// Adds to acc the products of what two loaders fill in `steps` steps, up to k_end. Each has `load`
// to begin a step's copies, `finish` for what this thread does to its own copies once they are
// there, and kBytes of a stage, of which the first kTileBytes are multiplied. The block has
// kThreads threads; `shared` holds kStages such pairs of stages and may be used again afterwards.
template <Math kMath, Along kA, Along kB, Terms kTerms = Terms::kProducts, typename ALoader,
          typename BLoader>
__device__ __forceinline__ void multiply_loaded(Accumulators& acc, unsigned char* shared,
                                                ALoader& a, BLoader& b, int64_t steps,
                                                int64_t k_end) {
  constexpr int kBytes = ALoader::kBytes + BLoader::kBytes;
  const auto begin_step = [&](int64_t step) {
    if (step < steps) {
      unsigned char* stage = shared + step % kStages * kBytes;
      a.load(stage, k_end);
      b.load(stage + ALoader::kBytes, k_end);
    }
    copy_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) begin_step(step);
  for (int64_t step = 0; step < steps; ++step) {
    unsigned char* stage = shared + step % kStages * kBytes;
    copy_async_wait<kStages - 2>();
    a.finish(stage);
    // every thread's copies of this step are there, and nobody reads the stage that is filled next
    __syncthreads();
    begin_step(step + kStages - 1);
    multiply_step<kMath, kA, kB, kTerms>(acc, stage, stage + ALoader::kBytes);
  }
  copy_async_wait<0>();
  __syncthreads();
}

// Returns how many steps of the contraction there are from k_begin to k_end.
template <Math kMath>
__device__ __forceinline__ int64_t steps_of(int64_t k_begin, int64_t k_end) {
  constexpr int kStep = kStepBytes / sizeof(Element<kMath>);
  return k_end > k_begin ? ceil_div(k_end - k_begin, kStep) : 0;
}

// Adds to acc the sum over k_begin <= k < k_end of a(m0 + row, k) b(n0 + column, k), or of the
// square of their difference. `shared` holds kSharedBytes.
template <Math kMath, Along kA, Along kB, Terms kTerms = Terms::kProducts>
__device__ __forceinline__ void multiply(Accumulators& acc, unsigned char* shared, const Source& a,
                                         const Source& b, int64_t group, int64_t m0, int64_t n0,
                                         int64_t k_begin, int64_t k_end) {
  typename OperandTile<kMath, kA>::Loader a_loader(a, group, m0, k_begin);
  typename OperandTile<kMath, kB>::Loader b_loader(b, group, n0, k_begin);
  multiply_loaded<kMath, kA, kB, kTerms>(acc, shared, a_loader, b_loader,
                                         steps_of<kMath>(k_begin, k_end), k_end);
}

// Epilogues that work along the rows of the tile find it in shared memory: [kTile, kTile] and
// swizzled, so that eight rows of a fragment lie in different banks, as do eight columns of four
// groups of eight rows. Nobody else may still use `shared`.
static_assert(kSharedBytes >= kTile * kTile * 4, "an fp32 tile has to fit the operands' memory");

__device__ __forceinline__ float* staged(float* shared, int row, int column) {
  return shared + row * kTile + ((column / 4 ^ (row & 7) ^ (row >> 3 & 3) << 1) * 4 + column % 4);
}

__device__ __forceinline__ void stage(const Accumulators& acc, float* shared) {
  struct alignas(8) Pair {
    float x, y;
  };
  KDK_UNROLL
  for (int i = 0; i < 8; ++i) {
    KDK_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float* from = acc[i / 2][j] + i % 2 * 2;
      *reinterpret_cast<Pair*>(staged(shared, first_row() + 8 * i, first_column() + 8 * j)) = {
          from[0], from[1]};
    }
  }
  __syncthreads();
}

// Loads columns `column` ... `column` + 7 of a row; `column` is a multiple of 8.
__device__ __forceinline__ void load_eight(float (&x)[8], float* shared, int row, int column) {
  KDK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const auto four = *reinterpret_cast<const Float4*>(staged(shared, row, column + 4 * half));
    KDK_UNROLL
    for (int e = 0; e < 4; ++e) x[4 * half + e] = four.x[e];
  }
}

// Puts eight columns back.
__device__ __forceinline__ void stage_eight(const float (&x)[8], float* shared, int row,
                                            int column) {
  KDK_UNROLL
  for (int half = 0; half < 2; ++half) {
    *reinterpret_cast<Float4*>(staged(shared, row, column + 4 * half)) = {
        x[4 * half], x[4 * half + 1], x[4 * half + 2], x[4 * half + 3]};
  }
}

// Calls f(x, row, column) for this thread's share of the first rows x columns of a staged tile,
// eight columns at a time. Sixteen threads have a row.
template <typename F>
__device__ __forceinline__ void for_each_eight(float* shared, int64_t rows, int64_t columns,
                                               const F& f) {
  constexpr int kAcross = kTile / 8;
  const int column = threadIdx.x % kAcross * 8;
  if (column >= columns) return;
  for (int row = threadIdx.x / kAcross; row < kTile && row < rows; row += kThreads / kAcross) {
    float x[8];
    load_eight(x, shared, row, column);
    f(x, row, column);
  }
}

}  // namespace kdk::cuda
