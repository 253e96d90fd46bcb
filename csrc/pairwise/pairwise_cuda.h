// SPDX-License-Identifier: Apache-2.0
// This header declares the launchers of the CUDA kernels of pairwise, and their parameters. The
// residuals are described in kdkernels/ops/pairwise.py.
#pragma once

#include "../common/cuda/product.h"
#include "pairwise_math.h"

namespace kdk::pairwise {

// The number that the kernels need of each row beside its features.
enum class RowNumber {
  kInverse,  // 1 / max(|x|, eps)
  kSquared,  // |x|^2; NaN where the row is not finite
  kBound,    // close_bound of that
};

struct RowNumbersParams {
  cuda::Source x[2];   // [G, N, D] and [G, M, D]; the second without rows where the sides are one
  float* number[2];    // [G, N], [G, M]
  const float* point;  // [G, D] that distances are taken from; null where rows stay as they are
  float* moved[2];     // [G, N, D] and [G, M, D], x less that
  int64_t G;
  RowNumber what;
  Metric metric;
  double gamma;
  float close_share;
};

struct ValuesParams {
  cuda::Source x, y;  // [G, N, D], [G, M, D], of distances less a point
  cuda::Source given_x, given_y;
  const float* x_number;  // [G, N]: inverse norms (kCosine) or squared norms (distances)
  const float* y_number;  // [G, M]
  void* out;              // [G, N, M] contiguous, of the dtype of x
  int64_t G;
  bool in_batch;  // y is x
  Metric metric;
  float gamma;
  float close_share;  // of |x|^2 + |y|^2, below which d^2 comes from differences
  float sharpness;    // the gamma with which rounding shows in kRbf
};

// A matrix for each group. It may have any strides, which are in elements.
struct Strided {
  const void* data;
  int64_t group, row, column;
  bool aligned;  // whichever axis is contiguous, its lines begin at multiples of 16 bytes

  __host__ __device__ Strided transposed() const { return {data, group, column, row, aligned}; }
};

inline constexpr int kPiece = 64;  // rows and columns of the tiles that weights are made in

// The pairs of some rows of one side, called x, with all rows of the other side, called y. For dy
// the sides are swapped.
struct PairsParams {
  Strided dout, values;       // [groups, all_rows, cols]; values of distances only
  const float* number;        // [groups, all_rows], RowNumber of x; null for kDot
  const float* other_number;  // [groups, cols], of y
  int64_t groups, first, rows, all_rows, cols;
  bool in_batch;  // the sides are one
  Metric metric;
  float gamma;
  // For distances, these have for each row and kPiece columns the sum of the weights, and whether a
  // pair is close. [groups, pieces, rows]
  float* sums;
  uint8_t* close;
};

// A launch makes W of dx = W y, or for distances of dx = (sum W) x - W y. Weights of close pairs
// are left out.
struct WeightsParams {
  PairsParams pairs;
  void* weights;         // [groups, rows, cols]
  unsigned* semaphores;  // [semaphore_count], zeros for the product that follows
  int64_t semaphore_count;
};

// For distances, a launch makes dx = (sum W) x - W y, and adds the contributions of close pairs by
// differences.
struct GradientParams {
  PairsParams pairs;
  cuda::Source x, y;     // [groups, all_rows, D], [groups, cols, D], as given
  cuda::Source moved;    // x as the product takes it, in the dtype of x
  const float* product;  // [groups, rows, D]: W y
  void* dx;              // [groups, all_rows, D] contiguous, of the dtype of x
};

// `math` tells the dtype of features, incoming gradients and values. For fp16 features the weights
// are fp32.
void launch_pairwise_row_numbers(const RowNumbersParams& params, cuda::Math math,
                                 cudaStream_t stream);
void launch_pairwise_values(const ValuesParams& params, cuda::Math math, cudaStream_t stream);
void launch_pairwise_bwd_weights(const WeightsParams& params, cuda::Math math, cudaStream_t stream);
void launch_pairwise_bwd_gradient(const GradientParams& params, cuda::Math math,
                                  cudaStream_t stream);

}  // namespace kdk::pairwise
