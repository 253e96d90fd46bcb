// SPDX-License-Identifier: Apache-2.0
// A tile of rows sweeps over tiles of keys. The pipeline of copies does not stop between tiles, so
// the keys of the next tile arrive during the epilogue of this one.
#pragma once

#include "../common/cuda/main_loop.h"
#include "relational_kl_cuda.h"

namespace kdk::relational_kl {

using namespace kdk::cuda;

template <Math kMath>
inline constexpr int kStageBytes = (pieces_of(kMath) + 1) * kTileBytes;

// This stands in place of a logit that does not count. Its weight is 0, and it is finite, so that 0
// times it is 0.
inline constexpr float kLeast = -3e38f;

__device__ __forceinline__ int64_t counting_keys(const int64_t* num_keys, int64_t all) {
  return num_keys != nullptr && *num_keys < all ? *num_keys : all;
}

// Returns x, of which the compiler then knows nothing: what follows from x is computed where it is
// used, and occupies no register before.
__device__ __forceinline__ int unknown(int x) {
#if !defined(KDK_CUDA_HOST)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The tiles of a block, whose rows are the x axis of the grid and whose keys the y axis.
struct Place {
  int tiles;     // of keys
  int counting;  // of their keys, the first ones
  int key_tile;  // the first

  __device__ __forceinline__ explicit Place(const SweepParams& p)
      : key_tile(static_cast<int>(blockIdx.y) * p.tiles) {
    const int64_t left = ceil_div(p.K, kTile) - key_tile;
    tiles = left < p.tiles ? static_cast<int>(left) : p.tiles;
    const int64_t all = counting_keys(p.num_keys, p.all) - p.first;
    const int64_t count = (all < p.K ? all : p.K) - k0();
    counting = count < 0 ? 0 : count < tiles * kTile ? static_cast<int>(count) : tiles * kTile;
  }
  // These return the block's first row of the operand, and its first key among those of the call.
  __device__ __forceinline__ int64_t row0() const {
    return static_cast<int64_t>(unknown(static_cast<int>(blockIdx.x))) * kTile;
  }
  __device__ __forceinline__ int64_t k0() const {
    return static_cast<int64_t>(unknown(key_tile)) * kTile;
  }
};

// A thread has eight columns of its warp's strip of 32, in pairs eight apart. It does not matter to
// a softmax which key a column is, so the keys are put where a thread's eight columns are eight
// neighbouring keys.
__device__ __forceinline__ int key_of_column(int n) {
  return (n & ~31) + (n >> 1 & 3) * 8 + (n >> 3 & 3) * 2 + (n & 1);
}

// Which entries of a tile this thread has: rows row + 8 h, and of the block's keys key + e. This
// struct is made anew for each row, so that addresses of no two rows are held at once.
struct Entries {
  int thread, lane, across, row, key;

  __device__ __forceinline__ explicit Entries(int tile)
      : thread(unknown(static_cast<int>(threadIdx.x))),
        lane(thread % 4),
        across(thread / 32 % kWarpsAcross),
        row(thread / 32 / kWarpsAcross * kWarpRows + thread % 32 / 4),
        key(tile * kTile + across * kWarpColumns + lane * 8) {}
};

// Returns the accumulator for key e of row h of this thread.
__device__ __forceinline__ float& entry(Accumulators& acc, int h, int e) {
  return acc[h / 2][e / 2][h % 2 * 2 + e % 2];
}

// Returns the query that a row of the operand belongs to.
__device__ __forceinline__ int64_t query_of(int64_t row, bool teacher) {
  return teacher ? row / (2 * kGroup) * kGroup + row % kGroup : row;
}

// For each row of the tile, the key that is left out and the positive key, counted from the block's
// first key on; -1 where the block does not have that key.
struct Marks {
  int out[kTile], positive[kTile];

  __device__ __forceinline__ void fill(const SweepParams& p, const Place& place) {
    if (threadIdx.x >= kTile) return;
    const int64_t query = query_of(place.row0() + threadIdx.x, p.teacher);
    const auto from = [&](const int64_t* key) {
      const int64_t at = key && query < p.B ? key[query] - p.first - place.k0() : -1;
      return at >= 0 && at < static_cast<int64_t>(place.tiles) * kTile ? static_cast<int>(at) : -1;
    };
    out[threadIdx.x] = from(p.exclude);
    positive[threadIdx.x] = from(p.positives);
  }
};

// Begins to copy step `step` of a tile of keys. Addresses are computed each time: registers are
// what the sweep is short of.
template <Math kMath>
__device__ __forceinline__ void load_keys(unsigned char* to, const Source& keys, const Place& place,
                                          int tile, int step) {
  using Tile = OperandTile<kMath, Along::kContraction>;
  constexpr int kApart = kTile / Tile::kCopies;  // keys between a thread's copies
  static_assert(kApart % kWarpColumns == 0, "the order of keys is the same for all copies");
  const int key = tile * kTile + key_of_column(Tile::row(0));
  const int64_t column = static_cast<int64_t>(step) * Tile::kStep + Tile::column(0);
  const int64_t left = keys.cols - column;
  const int count = left <= 0                ? 0
                    : left < Tile::kPerChunk ? static_cast<int>(left)
                                             : Tile::kPerChunk;
  const auto* from =
      static_cast<const typename Tile::T*>(keys.data) + (place.k0() + key) * keys.stride + column;
  KDK_UNROLL
  for (int c = 0; c < Tile::kCopies; ++c)
    Tile::copy(Tile::place(to, c), from + c * kApart * keys.stride,
               key + c * kApart < place.counting ? count : 0, keys.aligned);
}

// Calls epilogue(acc, tile) for tiles 0 ... tiles - 1 of the block's keys, with the unscaled logits
// of the block's rows. Keys that do not count have logits of 0. `shared` holds kCount *
// kStageBytes.
template <Math kMath, int kCount = kStages, typename Epilogue>
__device__ __forceinline__ void sweep(const SweepParams& p, unsigned char* shared,
                                      const Place& place, int tiles, const Epilogue& epilogue) {
  using Tile = OperandTile<kMath, Along::kContraction>;
  constexpr int kPieces = pieces_of(kMath);
  const int first_steps = p.operand.steps[0], steps = first_steps + p.operand.steps[1];
  // Rows of few enough features stay in shared memory: each stage holds one of their steps.
  const bool resident = steps <= kCount;
  const auto stage_of = [&](int tile, int step) {
    return shared + (tile * steps + step) % kCount * kStageBytes<kMath>;
  };
  // Begins to copy the step that is `ahead` of step `step` of a tile.
  const auto begin_step = [&](int tile, int step, int ahead) {
    for (step += ahead; step >= steps; step -= steps) ++tile;
    if (tile < tiles) {
      unsigned char* stage = stage_of(tile, step);
      unsigned char* of_keys = stage + kPieces * kTileBytes;
      if (step < first_steps) {
        load_keys<kMath>(of_keys, p.keys[0], place, tile, step);
      } else {
        load_keys<kMath>(of_keys, p.keys[1], place, tile, step - first_steps);
      }
      if (!resident || tile == 0) {
        const auto* rows = static_cast<const typename Tile::T*>(p.operand.data) +
                           (place.row0() + Tile::row(0)) * kPieces * p.operand.width +
                           step * Tile::kStep + Tile::column(0);
        KDK_UNROLL
        for (int c = 0; c < Tile::kCopies; ++c) {
          KDK_UNROLL
          for (int piece = 0; piece < kPieces; ++piece)
            copy_async(Tile::place(stage + piece * kTileBytes, c),
                       rows + (c * (kTile / Tile::kCopies) * kPieces + piece) * p.operand.width,
                       kChunkBytes);
        }
      }
    }
    copy_async_commit();
  };
  for (int ahead = 0; ahead < kCount - 1; ++ahead) begin_step(0, 0, ahead);
  for (int tile = 0; tile < tiles; ++tile) {
    Accumulators acc;
    fill(acc, 0);
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kCount - 2>();
      // every thread's copies of this step are there, and nobody reads the stage filled next
      __syncthreads();
      begin_step(tile, step, kCount - 1);
      unsigned char* stage = stage_of(tile, step);
      unsigned char* of_rows = resident ? stage_of(0, step) : stage;
      // one piece after the other: fragments of both at once would not fit the registers
      KDK_ROLLED
      for (int piece = kPieces - 1; piece >= 0; --piece)
        multiply_step<kMath, Along::kContraction, Along::kContraction>(
            acc, of_rows + piece * kTileBytes, stage + kPieces * kTileBytes);
    }
    epilogue(acc, tile);
  }
  copy_async_wait<0>();
  __syncthreads();
}

// Multiplies the entries of rows first + 2 h, or of all rows if kBoth, by the factors of their
// keys.
template <bool kBoth>
__device__ __forceinline__ void scale_entries(Accumulators& acc, const float* scale,
                                              const Place& place, int tile, int first = 0) {
  if (scale == nullptr) return;
  KDK_UNROLL
  for (int e = 0; e < 8; ++e) {
    const Entries mine(tile);
    const float f = mine.key + e < place.counting ? scale[place.k0() + mine.key + e] : 1.0f;
    KDK_UNROLL
    for (int h = 0; h < 8; ++h) {
      if (kBoth || h % 2 == first) entry(acc, h, e) *= f;
    }
  }
}

__device__ __forceinline__ void scale_logits(Accumulators& acc, const SweepParams& p,
                                             const Place& place, int tile) {
  scale_entries<false>(acc, p.scale[0], place, tile, 0);
  scale_entries<false>(acc, p.scale[1], place, tile, 1);
}

// Stores the operand's rows, or the teacher's rows alone where the queries are. Rows are padded to
// a multiple of eight.
template <typename T>
__device__ __forceinline__ void store_rows(Accumulators& acc, const SweepParams& p,
                                           const Place& place, int tile, void* to, int64_t stride,
                                           bool only_teacher) {
  KDK_UNROLL
  for (int h = 0; h < 8; ++h) {
    const Entries mine(tile);
    const int64_t k = place.k0() + mine.key;
    int64_t row = place.row0() + mine.row + 8 * h;
    if (only_teacher) row = h % 2 == 1 ? query_of(row, true) : p.B;
    if (k >= stride || (only_teacher && row >= p.B)) continue;
    float x[8];
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = entry(acc, h, e);
    store_eight(static_cast<T*>(to) + row * stride + k, x, 8, true);
  }
}

}  // namespace kdk::relational_kl
