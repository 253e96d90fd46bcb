// SPDX-License-Identifier: Apache-2.0
// This header declares the launchers of the CUDA kernels of relational_kl, and their parameters.
// The residuals are described in kdkernels/ops/relational_kl.py.
//
// Rows of both sides make one operand, so that one product with a tile of keys gives both sides'
// logits: eight student rows, the same eight of the teacher, and so on. Query q is row q / 8 * 16 +
// q % 8, and its teacher is 8 rows further on. Without a teacher, query q is row q.
#pragma once

#include "../common/cuda/product.h"
#include "relational_kl_math.h"

namespace kdk::relational_kl {

inline constexpr int kGroup = 8;  // neighbouring rows of one side

// Returns how many pieces a row of the operand has: two pieces of 16 bits hold what a logit needs
// of fp32.
__host__ __device__ constexpr int pieces_of(cuda::Math math) {
  return math == cuda::Math::kBFloat16 ? 2 : 1;
}

struct Operand {
  void* data;     // [rows, pieces, width], of the keys' dtype
  int64_t rows;   // whole tiles; zeros beyond the queries
  int64_t width;  // of a piece: whole steps of the first bank, and behind them those of the second
  int steps[2];   // of each bank; 0 for a second one where there is none
};

// A launch makes the scales of rows and keys, and the logits of own keys.
struct ScalesParams {
  cuda::Source x[2], own;  // [B, D] student, [B, E] teacher, [B, D]; without data where not given
  cuda::Source keys[2];    // [K, D] and [K, E]
  int banks;               // whose keys have scales
  bool normalize;
  double temperature[2];
  const float* factor[2];  // [] or null
  float *numbers, *key_scales;
  int64_t B, K;
};

struct PrepareParams {
  cuda::Source x[2];      // [B, D] student and [B, E] teacher
  cuda::Dtype dtype;      // of both
  const float* scale[2];  // [B]
  Operand operand;
  bool teacher;
};

enum class Of { kStudent, kTeacher, kOwnKeys, kKeys };

// A launch makes the gradient of rows from derivatives v by the rows times their scales, which are
// dout times too small if they are the student's, and from the logits of own keys.
struct RowGradientsParams {
  Of of;
  const float* v;           // [n, D]; null for own keys
  cuda::Source x[2], own;   // as ScalesParams has them
  cuda::Source keys;        // where the gradient is that of keys
  const float* key_scales;  // [K], or null for 1
  const int64_t* num_keys;  // [], how many of the keys count; null for all
  bool normalize, subtract_entropy;
  const float *numbers, *loss, *dout;  // [7, B], [B], [B]
  int64_t dout_stride, B;
  const float* factor;  // [], with dfactor
  float* dfactor;       // [B] or null
  void* out;            // [n, D] of the rows' dtype, or null; v itself where that is fp32
};

// A sweep of queries against keys, of which a block has `tiles` tiles.
struct SweepParams {
  Operand operand;
  cuda::Source keys[2];   // one bank, or the student's and the teacher's; all of one length K
  const float* scale[2];  // [K], of each side; null for 1
  int64_t B, K;
  int64_t first;             // of these keys, among all
  int64_t all;               // number of all keys
  const int64_t* num_keys;   // [], how many of them count; null for all
  const int64_t* exclude;    // [B] or null
  const int64_t* positives;  // [B] or null, where there is no teacher
  bool teacher, subtract_entropy;
  int tiles;
};

// A launch sums softmaxes, and leaves weights exp(a - maximum so far) times the student's scale.
struct WeightsParams {
  SweepParams sweep;
  float* parts;     // [splits, 3, rows]: maximum, sum and mean of the keys that a block had
  float* positive;  // [B], the logit of the positive key
  // The weights and their maxima. Both are null if nobody asks for the gradient.
  void* weights;   // [rows, stride], of the operand's dtype
  int64_t stride;  // a multiple of kGroup
  float* maxima;   // [tiles of keys, rows], which the weights of a tile are relative to
};

struct MergeParams {
  const float* parts;     // [splits, 3, rows]
  const float* positive;  // [B]
  int64_t splits, rows, B, K;
  const int64_t *num_keys, *exclude, *positives;
  bool teacher, subtract_entropy;
  const float *own_student, *own_teacher;   // [B] or null
  float *loss, *lse_student, *lse_teacher;  // [B]
  float* softmax;  // [4, B], of the student and of the teacher the maximum and 1 / sum; or null
};

// A launch multiplies the student's softmax less the teacher's with the keys. There are few tiles
// and many splits, so each split is stored, and another launch adds them up: a block that came last
// would have to read all of them.
struct DifferenceParams {
  // a is not read, out [splits, M, N] fp32, split_length a multiple of kTile
  cuda::ProductParams product;
  const void* weights;  // as WeightsParams has them
  int64_t stride, rows;
  const float* maxima;
  const float* softmax;      // as MergeParams has it: a rounded lse would be common to a row
  const int64_t* positives;  // [B], subtracted in the teacher's place; or null
  const float* scale;        // [K] or null
  bool teacher;
};

// A launch makes dout times the derivatives by both sides' logits, in the operand's rows. With
// `only_teacher` it makes those by the teacher's logits, times the teacher's scale, in the queries'
// rows.
struct DerivativesParams {
  SweepParams sweep;
  const float *loss, *lse_student, *lse_teacher;  // [B]
  const float* dout;                              // [B], dout_stride apart
  int64_t dout_stride;
  bool only_teacher;
  void* out;             // [rows or B, stride], of the operand's dtype
  int64_t stride;        // a multiple of kGroup
  unsigned* semaphores;  // [semaphore_count], set to 0 for the product that follows
  int64_t semaphore_count;
};

void launch_relational_kl_scales(const ScalesParams& params, cuda::Dtype dtype,
                                 cudaStream_t stream);
void launch_relational_kl_bwd_rows(const RowGradientsParams& params, int64_t rows,
                                   cuda::Dtype dtype, cudaStream_t stream);
void launch_relational_kl_prepare(const PrepareParams& params, cuda::Math math,
                                  cudaStream_t stream);
void launch_relational_kl_weights(const WeightsParams& params, cuda::Math math,
                                  cudaStream_t stream);
void launch_relational_kl_merge(const MergeParams& params, cudaStream_t stream);
void launch_relational_kl_difference(const DifferenceParams& params, cuda::Math math,
                                     cudaStream_t stream);
void launch_relational_kl_bwd_derivatives(const DerivativesParams& params, cuda::Math math,
                                          cudaStream_t stream);

}  // namespace kdk::relational_kl
