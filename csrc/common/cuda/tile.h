// SPDX-License-Identifier: Apache-2.0
// Tiles of operands lie in shared memory. They are filled from global memory, swizzled so that
// neither the copies nor the tensor core's loads meet bank conflicts, and read from there.
#pragma once

#include "async_copy.h"
#include "mma.h"

namespace kdk::cuda {

struct alignas(16) Float4 {
  float x[4];
};

template <typename T>
struct alignas(kChunkBytes) Chunk {
  T x[kChunkBytes / sizeof(T)];
};

// Stores `count` of eight neighbours: in stores of 16 bytes where all eight are there and
// `together` says that they are aligned.
template <typename T>
__device__ __forceinline__ void store_eight(T* to, const float (&x)[8], int64_t count,
                                            bool together) {
  constexpr int kEach = kChunkBytes / sizeof(T);
  if (together && count >= 8) {
    KDK_UNROLL
    for (int part = 0; part < 8 / kEach; ++part) {
      Chunk<T> chunk;
      KDK_UNROLL
      for (int e = 0; e < kEach; ++e) chunk.x[e] = from_float<T>(x[part * kEach + e]);
      *reinterpret_cast<Chunk<T>*>(to + part * kEach) = chunk;
    }
  } else {
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) {
      if (e < count) to[e] = from_float<T>(x[e]);
    }
  }
}

// Reads `count` of eight neighbours and sets the others to 0: in loads of 16 bytes where all eight
// are there and `together` says that they are aligned.
template <typename T>
__device__ __forceinline__ void read_eight(float (&x)[8], const T* from, int64_t count,
                                           bool together) {
  constexpr int kEach = kChunkBytes / sizeof(T);
  if (together && count >= 8) {
    KDK_UNROLL
    for (int part = 0; part < 8 / kEach; ++part) {
      const auto chunk = *reinterpret_cast<const Chunk<T>*>(from + part * kEach);
      KDK_UNROLL
      for (int e = 0; e < kEach; ++e) x[part * kEach + e] = to_float(chunk.x[e]);
    }
  } else {
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = e < count ? to_float(from[e]) : 0.0f;
  }
}

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

  // Begins to copy the first `count` elements of a chunk, with zeros behind them. `aligned` says
  // whether `from` is a multiple of 16 bytes.
  static __device__ __forceinline__ void copy(unsigned char* to, const T* from, int count,
                                              bool aligned) {
    if (aligned) return copy_async(to, from, count * static_cast<int>(sizeof(T)));
    Chunk<T> values;
    KDK_UNROLL
    for (int e = 0; e < kPerChunk; ++e) values.x[e] = e < count ? from[e] : T{};
    *reinterpret_cast<Chunk<T>*>(to) = values;
  }

  static constexpr int kCopies = kRows * kChunks / kThreads;  // of a thread, per step
  static_assert(kCopies * kThreads == kRows * kChunks, "every thread copies as much");
  // Where this thread's copy c goes.
  static __device__ __forceinline__ int row(int c) {
    return (static_cast<int>(threadIdx.x) + c * kThreads) / kChunks;
  }
  static __device__ __forceinline__ int column(int c) {
    return (static_cast<int>(threadIdx.x) + c * kThreads) % kChunks * kPerChunk;
  }
  static __device__ __forceinline__ unsigned char* place(unsigned char* tile, int c) {
    return tile + offset(row(c), column(c) / kPerChunk);
  }

  // Fills tile after tile along the contraction. What does not change from step to step is computed
  // once, since the copies share issue slots with the tensor core's instructions.
  class Loader {
   public:
    static constexpr int kBytes = kTileBytes;  // of a stage
    static __device__ __forceinline__ void finish(unsigned char*) {}

    __device__ __forceinline__ Loader(const Source& source, int64_t group, int64_t output0,
                                      int64_t k0)
        : source_(source), k_(k0) {
      const T* data = static_cast<const T*>(source.data) + group * source.group;
      KDK_UNROLL
      for (int c = 0; c < kCopies; ++c) {
        const int64_t i = (kAcross ? k0 : output0) + row(c),
                      j = (kAcross ? output0 : k0) + column(c);
        from_[c] = data + i * source.stride + j;
        const int64_t left = kAcross                       ? source.cols - j
                             : i < source.rows && keeps(i) ? kPerChunk
                                                           : 0;
        count_[c] = left <= 0 ? 0 : left < kPerChunk ? static_cast<int>(left) : kPerChunk;
      }
    }

    // Begins to fill `tile` with the next step, and with zeros from k_end on.
    __device__ __forceinline__ void load(unsigned char* tile, int64_t k_end) {
      const bool whole = k_ + kStep <= k_end;
      KDK_UNROLL
      for (int c = 0; c < kCopies; ++c) {
        int count = count_[c];
        if (!whole) {
          const int64_t left = k_end - k_ - (kAcross ? row(c) : column(c));
          if (left <= 0) {
            count = 0;
          } else if (!kAcross && left < count) {
            count = static_cast<int>(left);
          }
        }
        if (kAcross && source_.keep != nullptr && count > 0 && !keeps(k_ + row(c))) count = 0;
        copy(place(tile, c), from_[c], count, source_.aligned);
        from_[c] += kAcross ? kStep * source_.stride : kStep;
      }
      k_ += kStep;
    }

   private:
    static constexpr bool kAcross = kAlong == Along::kOutput;
    __device__ __forceinline__ bool keeps(int64_t i) const {
      return source_.keep == nullptr || source_.keep[i * source_.keep_stride];
    }

    const Source& source_;
    int64_t k_;
    const T* from_[kCopies];
    int count_[kCopies];
  };

  // Loads outputs m ... m + 15 as operand a, for half `half` of the step.
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

  // Loads outputs n ... n + 15 as two operands b.
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

  // Loads four fp32 elements of one output, along the contraction.
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
