// SPDX-License-Identifier: Apache-2.0
// This header declares the launchers of the CUDA kernels of gram_mse, and their parameters. The
// residuals are described in kdkernels/ops/gram_mse.py.
#pragma once

#include "../common/cuda/product.h"
#include "gram_mse_math.h"

namespace kdk::gram_mse {

// What happens to Gram entries before the difference is squared: kRow divides them by a norm of
// their row, kTaylor puts them through a polynomial.
enum class Form { kRow, kPlain, kTaylor };

struct Problem {
  cuda::Source x[2];  // student and teacher, [G, B, D]
  int64_t G, B;
  const float* scale;  // [2, G, B], 1 / |x_i|; null where features are not normalised
  Form form;
  bool l1;
  Taylor<float> taylor;
};

// A launch computes 1 / |x_i| of both sides.
struct NormsParams {
  cuda::Source x[2];
  int64_t G, B;
  float* scale;  // [2, G, B]; null for none
};

// One launch makes both Grams in split sums and the norms, and clears the semaphores of the next
// launch.
struct ResidentParams {
  Problem problem;
  float* parts[2];  // [splits, G, B, B]
  int splits;
  int64_t split_length[2];
  NormsParams norms;
  unsigned* semaphores;  // [G]
};

// A launch adds up the splits, and reduces rows to coefficients and loss.
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

// A launch makes the symmetric W of dX = W X from both Grams. For normalised features W is scaled
// on both sides, so that it multiplies the features as they are.
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

// In the streamed form, a launch takes `tiles` rows of tiles and leaves the sums of their rows, and
// the sums that later rows have in the same tiles by symmetry. The sums are kSums doubles per row
// and tile.
struct PairSumsParams {
  Problem problem;
  int64_t group;
  int64_t first, tiles;  // rows of tiles
  double* along;         // [tiles across, kSums, tiles * kTile]: of row tile i, from tile (i, j)
  double* across;        // [tiles, kSums, B]: of rows in tile j > i, from tile (i, j)
};

// A launch adds up the sums of PairSumsParams. The rows of its tiles are then complete.
struct PairFinishParams {
  PairSumsParams sums;
  double* totals;      // [kSums, B], what earlier tiles left
  double* coef;        // [kCoefs, B]
  double* row_losses;  // [B]
};

// A launch makes some rows of W, from the diagonal on. They end with a tile or with the batch.
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
