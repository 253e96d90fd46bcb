// SPDX-License-Identifier: Apache-2.0
// This header declares the launchers of the CUDA kernels of triplet_all, and their parameters. The
// results are described in kdkernels/ops/triplet_all.py.
//
// Rows are fp32 and in the order of their labels, so that the positives of an anchor are one
// stretch of its row of distances. Anchors are taken in chunks. For each chunk, one launch makes
// the distances, another makes losses and weights from each row of distances, and products add up
// what the weights contribute to the gradients. Let W_ij be the derivative of the sum by d_ij times
// the slope of d_ij. Then the gradient of x_i is (sum_j W_ij) x_i - sum_j W_ij r_j.
#pragma once

#include "../common/cuda/product.h"
#include "../pairs/distance_math.h"

namespace kdk::triplet_all {

using pairs::Distance;

// The rows of one side, anchors or references. In batch both are the same.
struct Rows {
  // [N, D] fp32, in whole pieces of 16 bytes; a row that is not finite is 0
  cuda::Source x;        // less a point
  cuda::Source given;    // as the caller has them
  float* norm;           // [N], squared; NaN where the row is not finite
  const int64_t* order;  // [N], which row of the caller's each is
  double* sums;          // [N], sums of the weights of a row; null where no gradient is needed
  float* weighted;       // [N, D], sums of the weights times the other rows; null likewise
};

// A launch copies the rows of one side into the order of their labels.
struct PrepareParams {
  Rows rows;
  cuda::Source from;               // [N, D] of `math`'s dtype
  const float* point;              // [D]
  int64_t* place;                  // [N], where each row went
  const int64_t* label;            // [N], sorted
  const int64_t* reference_label;  // [M], sorted
  int64_t M;
  int64_t *begin, *end;  // [N], the references of a row's label; null for references
};

// A launch makes the distances of some anchors to all references. A tile of kTile^2 distances in
// which two rows are so close that products would cancel is made from differences, and flagged.
struct DistancesParams {
  Rows anchors, references;  // the anchors of the chunk, and all references
  bool in_batch;
  int64_t first;  // the chunk's first anchor
  Distance distance;
  float* d;        // [anchors, stride]
  int64_t stride;  // a multiple of 4
  int* close;      // [tiles of anchors, tiles of references]
};

enum class Form { kHinge, kSoftplus, kSemihard, kSoftSemihard };

// A launch makes the losses and weights of the anchors of a chunk.
struct WeighParams {
  DistancesParams chunk;       // d becomes the weights in flagged tiles
  const int64_t *begin, *end;  // [B]
  const int64_t* exclude;      // [B], sorted references; null where no anchor leaves one out
  const int64_t* place;        // [M]
  Form form;
  float margin;
  float* weights;     // [anchors, stride], 0 in flagged tiles; null where no gradient is needed
  double* losses;     // [B]
  int64_t* nonzero;   // [B]
  int64_t* triplets;  // [B]
  // The semaphores of the two products that follow, which this launch sets to 0.
  unsigned* semaphores[2];
  int64_t semaphore_count[2];
};

// A launch subtracts from `weighted` of anchors or references what the weights of flagged tiles
// contribute to their gradients, from differences of rows. For references it also adds the other
// weights to `sums`.
struct CloseParams {
  DistancesParams chunk;
  const float* weights;
  bool references;  // whose gradient: of the references, or of the anchors
};

// A launch makes dx = sums x - weighted, in the caller's order.
struct GradientParams {
  Rows rows;
  float* dx;  // [N, D]
};

struct TotalsParams {
  const double* losses;               // [B]
  const int64_t *nonzero, *triplets;  // [B]
  int64_t B;
  float* total;
  int64_t *nonzero_total, *triplets_total;
};

void launch_triplet_all_prepare(const PrepareParams& params, cuda::Math math, cudaStream_t stream);
void launch_triplet_all_distances(const DistancesParams& params, cuda::Math math,
                                  cudaStream_t stream);
void launch_triplet_all_weigh(const WeighParams& params, cudaStream_t stream);
void launch_triplet_all_close(const CloseParams& params, cudaStream_t stream);
void launch_triplet_all_gradient(const GradientParams& params, cudaStream_t stream);
void launch_triplet_all_totals(const TotalsParams& params, cudaStream_t stream);

}  // namespace kdk::triplet_all
