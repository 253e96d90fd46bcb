// SPDX-License-Identifier: Apache-2.0
// This header declares the launchers of the CUDA kernels of triplet, and their parameters. The
// residuals are described in kdkernels/ops/triplet.py.
#pragma once

#include "../common/cuda/product.h"
#include "../common/cuda/winner.h"
#include "../pairs/distance_math.h"

namespace kdk::triplet {

using cuda::Winner;
using pairs::Distance;

// Rows in the order of their labels.
struct SortedRows {
  cuda::Source x;        // [N, D], less a point, or as given where that has 16 bits
  cuda::Source given;    // [N, D]
  const int64_t* label;  // [N]
  const int64_t* row;    // [N], where it was before
  float* norm;           // [N], squared
};

struct PrepareParams {
  SortedRows rows;
  Winner* winners[2];  // [N], set to none: positive and negative of each row; null for references
  // the rows that are the positives, one for each of `rows` by its number before; null if searched
  cuda::Source paired;
  const float* point;  // [D], what `rows.given` is moved by to be `rows.x`; null where it is not
};

struct MineParams {
  SortedRows anchors, references;  // the same in batch
  bool in_batch;
  float close_share;   // of |x|^2 + |r|^2, below which d^2 comes from differences
  int sign[2];         // per side: 1 looks for the nearest, -1 for the farthest, 0 not at all
  Winner* winners[2];  // [B], of sorted anchors
  // Only rows beyond the winner of side `bound`, which was found with `bound_sign`, count. If it is
  // -1, all rows count.
  int bound, bound_sign;
  // [B], in the caller's order: the reference that each anchor leaves out, in the caller's order,
  // or one that there is not; null where none does
  const int64_t* exclude;
};

struct DistancesParams {
  SortedRows anchors;
  cuda::Source references;  // in the caller's order
  const Winner* winners[2];
  Distance distance;
  int64_t *positive, *negative;  // [B], in the caller's order, as are the distances
  float *d_ap, *d_an;            // [B]
};

struct GradientParams {
  cuda::Source x;         // [B, D] anchors
  cuda::Source r;         // [M, D]
  const int64_t* chosen;  // [2, B], rows of r, or -1
  const float* d;         // [2, B]
  const float* dd;        // [2, B]
  const int64_t* order;   // [2 B]: entries of `chosen` in the order of the rows chosen
  const int64_t* begin;   // [M + 1]: where those of each row begin
  void* out;              // [N, D]: gradient of x, or of r, in their dtype
  int64_t N;
  bool as_anchor, as_chosen;  // whether row i of out is anchor i, and whether it is row i of r
  Distance distance;
};

void launch_triplet_prepare(const PrepareParams& params, cuda::Math math, cudaStream_t stream);
void launch_triplet_mine(const MineParams& params, cuda::Math math, cudaStream_t stream);
void launch_triplet_distances(const DistancesParams& params, cuda::Math math, cudaStream_t stream);
void launch_triplet_gradient(const GradientParams& params, cuda::Math math, cudaStream_t stream);

}  // namespace kdk::triplet
