// SPDX-License-Identifier: Apache-2.0
// Distances do not change when a point is subtracted from all rows, and |x|^2 + |y|^2 - 2 <x, y>
// keeps its digits where rows lie around 0. docs/numerics.md derives what is done in which dtype.
#pragma once

#include "operand.h"

namespace kdk::cuda {

struct CentreParams {
  Source x;      // [G, M, D]
  float* point;  // [G, D]
  int64_t G;
};

// Launches the search for a point that the rows lie around: the mean of a sample of them in
// multiples of a power of two of the order of the deviation, as csrc/pairs/centre.h has it. Here
// each column has a unit of its own.
void launch_centre(const CentreParams& params, Math math, cudaStream_t stream);

// Returns below which share of |x|^2 + |y|^2 a squared distance from products of rows of this dtype
// is computed again from differences.
inline float close_share(Math math, int64_t D) {
  constexpr float kWide = 1.0f / 16;
  if (math != Math::kBFloat16 && math != Math::kFloat16) return kWide;
  const float share =
      (2 + static_cast<float>(D) / 4) * (math == Math::kBFloat16 ? 0x1p-16f : 0x1p-13f);
  return share < kWide ? share : kWide;
}

}  // namespace kdk::cuda
