// SPDX-License-Identifier: Apache-2.0
// Launchers of the CUDA kernels of gram_mse, and the parameters that they share. Residuals:
// kdkernels/ops/gram_mse.py.
#pragma once

#include "../common/cuda/product.h"
#include "gram_mse_math.h"

namespace kdk::gram_mse {

// What happens to Gram entries before the difference is squared.
enum class Form { kRow, kPlain, kTaylor };  // divided by a norm of their row, nothing, a polynomial

struct Problem {
  cuda::Source x[2];  // student and teacher, [G, B, D]
  int64_t G, B;
  const float* scale;  // [2, G, B], 1 / |x_i|; null where features are not normalised
  Form form;
  bool l1;
  Taylor<float> taylor;
};

// 1 / |x_i| of both sides.
struct NormsParams {
  cuda::Source x[2];
  int64_t G, B;
  float* scale;  // [2, G, B]; null for none
};

// Both Grams in split sums, the norms, and zeros for what follows, in one launch.
struct ResidentParams {
  Problem problem;
  float* parts[2];  // [splits, G, B, B]
  int splits;
  int64_t split_length[2];
  NormsParams norms;
  unsigned* semaphores;  // [G]
};

// Adds up the splits, and reduces rows to coefficients and loss.
struct FinishParams {
  Problem problem;
  const float* parts[2];  // [splits, G, B, B]; may be the Grams if there is one split
  int splits;
  float* gram[2];        // [G, B, B]
  double* coef;          // [G, kCoefs, B]
  double* row_losses;    // [G, B]
  float* loss;           // [G]
  unsigned* semaphores;  // [G]
};

// W of dX = W X, symmetric: what a gradient makes of two Grams. Of normalised features it is scaled
// on both sides, so that it multiplies them as they are.
struct WeightsParams {
  Problem problem;                      // its x is not read
  const float *side_gram, *other_gram;  // [G, B, B]
  const double* coef;                   // [G, kCoefs, B]
  int side;                             // whose gradient: 0 the student's
  const float* dout;                    // [G], dout_stride apart
  int64_t dout_stride;
  void* weights;         // [G, B, B], of `math`'s dtype
  unsigned* semaphores;  // [semaphore_count], zeros for the product that follows
  int64_t semaphore_count;
};

// Streamed: sums over the tiles of `tiles` rows of tiles, and what later rows have of those by
// symmetry. In doubles, of kSums each, one piece per tile.
struct PairSumsParams {
  Problem problem;
  int64_t group;
  int64_t first, tiles;  // rows of tiles
  double* along;         // [tiles across, kSums, tiles * kTile]: of row tile i, from tile (i, j)
  double* across;        // [tiles, kSums, B]: of rows in tile j > i, from tile (i, j)
};

// Adds those up; the rows of these tiles are then complete.
struct PairFinishParams {
  PairSumsParams sums;
  double* totals;      // [kSums, B], what earlier tiles left
  double* coef;        // [kCoefs, B]
  double* row_losses;  // [B]
};

// Some rows of W from their diagonal on, as in WeightsParams. They end with a tile, or the batch.
struct PairWeightsParams {
  WeightsParams weights;  // its Grams are not read; weights is [rows, B - first]
  int64_t group, first;
  int64_t rows;
  unsigned* more_semaphores;  // [more_semaphore_count], zeros for a second product
  int64_t more_semaphore_count;
};

struct LossParams {
  const double* row_losses;  // [G, B]
  float* loss;               // [G]
  int64_t B;
};

void launch_gram_mse_resident(const ResidentParams& params, cuda::Math math, cudaStream_t stream);
void launch_gram_mse_finish(const FinishParams& params, cudaStream_t stream);
void launch_gram_mse_bwd_weights(const WeightsParams& params, cuda::Math math, cudaStream_t stream);
void launch_gram_mse_norms(const NormsParams& params, cuda::Math math, cudaStream_t stream);
void launch_gram_mse_loss(const LossParams& params, int64_t G, cudaStream_t stream);
void launch_gram_mse_pair_sums(const PairSumsParams& params, cuda::Math math, cudaStream_t stream);
void launch_gram_mse_pair_finish(const PairFinishParams& params, cudaStream_t stream);
void launch_gram_mse_bwd_pair_weights(const PairWeightsParams& params, cuda::Math math,
                                      cudaStream_t stream);

}  // namespace kdk::gram_mse
