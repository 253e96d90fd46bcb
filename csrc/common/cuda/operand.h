// SPDX-License-Identifier: Apache-2.0
// Both glue and kernels know the operands of products by these types.
#pragma once

#include "device.h"

namespace kdk::cuda {

// How the product of operands of a dtype is made. All accumulate in fp32.
enum class Math {
  kBFloat16,
  kFloat16,
  kTf32x3,  // fp32 in two tf32 pieces, three products of them: about 2^-21 instead of 2^-11
  kIeee,    // fp32 as it is, without tensor cores
};

// The dtype of a result in memory.
enum class Dtype { kFloat, kBFloat16, kFloat16 };

inline size_t element_bytes(Math math) {
  return math == Math::kBFloat16 || math == Math::kFloat16 ? 2 : 4;
}

inline constexpr int kThreads = 256;
inline constexpr int kTile = 128;                      // rows and columns of a product's tile
inline constexpr int kStepBytes = 64;                  // of the contraction, per step
inline constexpr int kChunkBytes = 16;                 // of a copy
inline constexpr int kTileBytes = kTile * kStepBytes;  // of one operand

// Which index of an operand is contiguous in memory.
enum class Along { kContraction, kOutput };

// An operand in global memory: a matrix with contiguous rows.
struct Source {
  const void* data;
  int64_t rows, cols;
  int64_t stride;    // between rows, in elements
  int64_t group;     // between groups, in elements
  const bool* keep;  // [rows], which rows are read, the others count as 0; null for all
  int64_t keep_stride;
  bool aligned;  // every row begins at a multiple of 16 bytes
};

}  // namespace kdk::cuda
