// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of triplet_all, and the parameters that they share. Results:
// kdkernels/ops/triplet_all.py.
//
// Rows are fp32 and in the order of their labels, so that the positives of an anchor are one
// stretch of its distances. Anchors are taken in chunks: their distances, then losses and weights
// from each row of distances, then what the weights contribute to the gradients. With W_ij the
// derivative of the sum by d_ij times the slope of d_ij, the gradient of x_i is (sum_j W_ij) x_i -
// sum_j W_ij r_j.
#pragma once

#include "../common/cuda/product.h"
#include "../pairs/distance_math.h"

namespace kdk::triplet_all {

using pairs::Distance;

// One side, anchors or references; in batch the same.
struct Rows {
  cuda::Source x;        // [N, D] fp32, rows of 16-byte pieces; zeros where a row is not finite
  float* norm;           // [N], squared; NaN where the row is not finite
  const int64_t* order;  // [N], which rows these were
  double* sums;          // [N], of the weights on a row; null where no gradient is needed
  float* weighted;       // [N, D], of the weights times the other rows; likewise
};

// Copies rows into the order of their labels.
struct PrepareParams {
  Rows rows;
  cuda::Source from;               // [N, D] of `math`'s dtype
  int64_t* place;                  // [N], where each row went
  const int64_t* label;            // [N], sorted
  const int64_t* reference_label;  // [M], sorted
  int64_t M;
  int64_t *begin, *end;  // [N], the references of a row's label; null for references
};

// Distances of some anchors. Tiles of kTile^2 in which two rows are so close that products would
// cancel are made from differences, and flagged.
struct DistancesParams {
  Rows anchors, references;  // those of the chunk, and all
  bool in_batch;
  int64_t first;  // the chunk's first anchor
  Distance distance;
  float* d;        // [anchors, stride]
  int64_t stride;  // a multiple of 4
  int* close;      // [tiles of anchors, tiles of references]
};

enum class Form { kHinge, kSoftplus, kSemihard, kSoftSemihard };

// Losses and weights of the anchors of a chunk.
struct WeighParams {
  DistancesParams chunk;       // d becomes the weights in flagged tiles
  const int64_t *begin, *end;  // [B]
  const int64_t* place;        // [M]
  Form form;
  float margin;
  float* weights;     // [anchors, stride], 0 in flagged tiles; null where no gradient is needed
  double* losses;     // [B]
  int64_t* nonzero;   // [B]
  int64_t* triplets;  // [B]
  // zeros for the products that follow
  unsigned* semaphores[2];
  int64_t semaphore_count[2];
};

// Takes off `weighted` of anchors or references what the weights of flagged tiles contribute to
// their gradient, from differences of rows. For references, also adds the other weights to `sums`.
struct CloseParams {
  DistancesParams chunk;
  const float* weights;
  bool references;  // whose gradient: of the references, or of the anchors
};

// dx = sums x - weighted, in the caller's order.
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
