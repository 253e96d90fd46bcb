// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of gram_mse share what they do with entries of the Grams and with rows.
#pragma once

#include "../common/cuda/rows.h"
#include "gram_mse_cuda.h"

namespace kdk::gram_mse {

__device__ __forceinline__ float row_scale(const Problem& p, int side, int64_t g, int64_t i) {
  return p.scale != nullptr && i < p.B ? p.scale[(side * p.G + g) * p.B + i] : 1.0f;
}

// Returns (A - K)^2 of an entry, where rows are not normalised.
__device__ __forceinline__ float squared_error(const Problem& p, float a, float k) {
  const float error = p.form == Form::kTaylor ? p.taylor.value(a) - p.taylor.value(k) : a - k;
  return error * error;
}

// Adds one entry of both Grams to the kSums sums of its row, or its squared error to the first of
// them.
__device__ __forceinline__ void add_entry(const Problem& p, double (&sums)[kSums], float a,
                                          float k) {
  if (p.form != Form::kRow) {
    sums[0] += squared_error(p, a, k);
    return;
  }
  const double wide_a = a, wide_k = k;
  sums[0] += wide_a * wide_a;
  sums[1] += wide_k * wide_k;
  sums[2] += wide_a * wide_k;
  if (p.l1) {
    sums[3] += fabs(wide_a);
    sums[4] += fabs(wide_k);
  }
}

// Stores loss and coefficients of row i from its sums.
__device__ __forceinline__ void finish_row(const Problem& p, const double (&sums)[kSums], int64_t i,
                                           double* coef, double* row_losses) {
  RowResult row;
  if (p.form == Form::kRow) {
    row = normalized_row(sums, !p.l1);
  } else {
    row.loss = sums[0];
    const double uniform[kCoefs] = {-2, 2, 2, 0, 0};
    for (int k = 0; k < kCoefs; ++k) row.coef[k] = uniform[k];
  }
  row_losses[i] = row.loss;
  for (int k = 0; k < kCoefs; ++k) coef[k * p.B + i] = row.coef[k];
}

// The coefficients a, b, c of a row for one side. Rounded, one would be wrong for all of a row of
// weights, and add up: for fp32 features Wide is double.
template <typename Wide>
struct RowCoefs {
  Wide a, b, c;
};

template <typename Wide>
__device__ __forceinline__ RowCoefs<Wide> row_coefs(const WeightsParams& p, int64_t g, int64_t i) {
  if (p.problem.form == Form::kTaylor || i >= p.problem.B) return {};
  const double* coef = p.coef + g * kCoefs * p.problem.B + i;
  return {static_cast<Wide>(coef[0]), static_cast<Wide>(coef[(1 + p.side) * p.problem.B]),
          static_cast<Wide>(coef[(3 + p.side) * p.problem.B])};
}

// Returns W_ij. `factor` is what all of W is multiplied by, times the scales of both rows.
template <typename Wide>
__device__ __forceinline__ float weight(const WeightsParams& p, float side, float other,
                                        const RowCoefs<Wide>& i, const RowCoefs<Wide>& j,
                                        float factor) {
  const float w =
      p.problem.form == Form::kTaylor
          ? taylor_weight(side, other, p.problem.taylor)
          : static_cast<float>(linear_weight<Wide>(side, other, i.a, j.a, i.b, j.b, i.c, j.c));
  return w * factor;
}

}  // namespace kdk::gram_mse
