// SPDX-License-Identifier: Apache-2.0
// The arithmetic of correlation. Derivation and names: docs/ops/correlation.md.
#pragma once

#include <cmath>

#include "../common/host_device.h"

namespace kdk::correlation {

// Of two vectors, less their means where those are taken out.
struct Moments {
  double aa, bb, ab;  // sums of squares and of products
};

struct Coefficients {
  double rho;
  double side, other;  // d rho / d a = other b - side a
};

KDK_HOST_DEVICE Coefficients coefficients(const Moments& m, double eps) {
  const double norm_a = sqrt(m.aa), norm_b = sqrt(m.bb), den = norm_a * norm_b + eps;
  const double rho = m.ab / den;
  // where the norm is 0, so is a
  return {rho, norm_a > 0 ? rho * norm_b / (norm_a * den) : 0, 1 / den};
}

}  // namespace kdk::correlation
