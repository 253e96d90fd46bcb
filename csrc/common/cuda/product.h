// SPDX-License-Identifier: Apache-2.0
// These products end in memory: out = a b + add, for each group. Where there are few tiles, the
// contraction is split over several blocks.
#pragma once

#include "operand.h"

namespace kdk::cuda {

// Sums of parts: out[i] is the sum over p of parts[p, i], added in the order of p.
struct PartSums {
  const float* parts;  // [count, size]
  void* out;           // [size]
  int64_t count, size;
  Dtype out_dtype;
};

struct ProductParams {
  Source a;              // [M, K], or [K, M] if a_along is kOutput
  Source b;              // [K, N]
  void* out;             // [G, M, N] contiguous
  const float* add;      // likewise; null for 0. May be `out`
  float* partials;       // [splits, G, tiles, kTile^2] if splits > 1
  unsigned* semaphores;  // [G, tiles], zeros, if splits > 1
  int64_t M, N, K;
  const int64_t* counting;  // on the device: how much of the contraction counts; null for all of it
  int64_t split_length;
  const float* scale;  // [G], scale_stride apart; null for 1
  int64_t scale_stride;
  int64_t tiles;  // of M x N
  int splits;
  Dtype out_dtype;  // kFloat; or kBFloat16 if the operands are, kFloat16 if they are not
  PartSums sums;    // done by further blocks of the same launch; size 0 for none
};

// The number of pieces that a contraction is cut into, and their length.
struct Splits {
  int count;
  int64_t length;
};

// Returns as many splits as fill the device twice, while each still takes several steps.
Splits split_contraction(int64_t tiles, int64_t K, Math math);

void launch_product(const ProductParams& params, int64_t groups, Along a_along, Math math,
                    cudaStream_t stream);

void launch_part_sums(const PartSums& sums, cudaStream_t stream);

}  // namespace kdk::cuda
