// SPDX-License-Identifier: Apache-2.0
// Tiles of operands in shared memory: how they are filled from global memory, swizzled so that
// neither the copies nor the tensor core's loads meet bank conflicts, and how they are read.
#pragma once

#include "async_copy.h"
#include "mma.h"

namespace kdk::cuda {

// Two neighbours, in one store where both are there and `together`.
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float x, float y, bool second, bool together) {
  struct alignas(2 * sizeof(T)) Pair {
    T x, y;
  };
  if (together && second) {
    *reinterpret_cast<Pair*>(to) = {from_float<T>(x), from_float<T>(y)};
  } else {
    to[0] = from_float<T>(x);
    if (second) to[1] = from_float<T>(y);
  }
}

// `count` of eight neighbours, in stores of 16 bytes where they are all there and `together`.
template <typename T>
__device__ __forceinline__ void store_eight(T* to, const float (&x)[8], int64_t count,
                                            bool together) {
  struct alignas(16) Chunk {
    T x[16 / sizeof(T)];
  };
  constexpr int kEach = 16 / sizeof(T);
  if (together && count >= 8) {
    KDK_UNROLL
    for (int part = 0; part < 8 / kEach; ++part) {
      Chunk chunk;
      KDK_UNROLL
      for (int e = 0; e < kEach; ++e) chunk.x[e] = from_float<T>(x[part * kEach + e]);
      *reinterpret_cast<Chunk*>(to + part * kEach) = chunk;
    }
  } else {
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) {
      if (e < count) to[e] = from_float<T>(x[e]);
    }
  }
}

struct alignas(16) Float4 {
  float x[4];
};

template <Math kMath, Along kAlong>
struct OperandTile {
  using T = Element<kMath>;
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kPerChunk = kChunkBytes / sizeof(T);
  static constexpr int kStep = kStepBytes / sizeof(T);  // of the contraction
  static constexpr int kRows = kAlong == Along::kContraction ? kTile : kStep;
  static constexpr int kChunks = kTileBytes / kRows / kChunkBytes;  // in a row

  // Eight rows that are read together lie in different banks.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int swizzled = kAlong == Along::kContraction ? chunk ^ (row >> 1 & 3)
                         : kHalf                       ? chunk ^ (row & 7)
                                                       : chunk ^ (row & 3) << 1;
    return (row * kChunks + swizzled) * kChunkBytes;
  }

  // Begins to fill the tile with outputs output0 ... and contraction k0 ... k_end; zeros beyond.
  static __device__ __forceinline__ void load(unsigned char* tile, const Source& source,
                                              const T* data, int64_t output0, int64_t k0,
                                              int64_t k_end) {
    const bool along = kAlong == Along::kContraction;
    const int64_t row0 = along ? output0 : k0, row_end = along ? source.rows : k_end;
    const int64_t col0 = along ? k0 : output0, col_end = along ? k_end : source.cols;
    KDK_UNROLL
    for (int c = threadIdx.x; c < kRows * kChunks; c += kThreads) {
      const int row = c / kChunks, chunk = c % kChunks;
      const int64_t i = row0 + row, j = col0 + chunk * kPerChunk;
      const bool kept =
          i < row_end && (source.keep == nullptr || source.keep[i * source.keep_stride]);
      const int64_t left = kept ? col_end - j : 0;
      const int count = left <= 0 ? 0 : left < kPerChunk ? static_cast<int>(left) : kPerChunk;
      const T* from = data + (count > 0 ? i * source.stride + j : 0);
      unsigned char* to = tile + offset(row, chunk);
      if (source.aligned) {
        copy_async(to, from, count * static_cast<int>(sizeof(T)));
      } else {
        struct alignas(16) Chunk {
          T x[kPerChunk];
        } values;
        KDK_UNROLL
        for (int e = 0; e < kPerChunk; ++e) values.x[e] = e < count ? from[e] : T{};
        *reinterpret_cast<Chunk*>(to) = values;
      }
    }
  }

  // Outputs m ... m + 15 as operand a, for half `half` of the step.
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], const unsigned char* tile, int m,
                                                int half) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    if constexpr (kAlong == Along::kContraction) {
      load_matrices(a, tile + offset(m + matrix % 2 * 8 + row, 2 * half + matrix / 2));
    } else if constexpr (kHalf) {
      load_matrices_transposed(a,
                               tile + offset(half * 16 + matrix / 2 * 8 + row, m / 8 + matrix % 2));
    } else {
      KDK_UNROLL
      for (int r = 0; r < 4; ++r)
        a[r] = word(tile, half * 8 + r / 2 * 4 + lane % 4, m + r % 2 * 8 + lane / 4);
    }
  }

  // Outputs n ... n + 15 as two operands b.
  static __device__ __forceinline__ void load_b(uint32_t (*b)[2], const unsigned char* tile, int n,
                                                int half) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    if constexpr (kAlong == Along::kContraction || kHalf) {
      uint32_t r[4];
      if constexpr (kAlong == Along::kContraction) {
        load_matrices(r, tile + offset(n + matrix / 2 * 8 + row, 2 * half + matrix % 2));
      } else {
        load_matrices_transposed(
            r, tile + offset(half * 16 + matrix % 2 * 8 + row, n / 8 + matrix / 2));
      }
      KDK_UNROLL
      for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
    } else {
      KDK_UNROLL
      for (int i = 0; i < 4; ++i)
        b[i / 2][i % 2] = word(tile, half * 8 + i % 2 * 4 + lane % 4, n + i / 2 * 8 + lane / 4);
    }
  }

  // fp32: four steps of the contraction of one output.
  static __device__ __forceinline__ Float4 load_four(const unsigned char* tile, int output, int k) {
    if constexpr (kAlong == Along::kContraction) {
      return *reinterpret_cast<const Float4*>(tile + offset(output, k / 4));
    } else {
      Float4 four;
      KDK_UNROLL
      for (int e = 0; e < 4; ++e) four.x[e] = float_of(word(tile, k + e, output));
      return four;
    }
  }

 private:
  static __device__ __forceinline__ uint32_t word(const unsigned char* tile, int row, int column) {
    return *reinterpret_cast<const uint32_t*>(tile + offset(row, column / 4) + column % 4 * 4);
  }
};

}  // namespace kdk::cuda
