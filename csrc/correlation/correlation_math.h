// SPDX-License-Identifier: Apache-2.0
// This is the arithmetic of correlation. docs/ops/correlation.md derives it and explains the names.
#pragma once

#include <cmath>

#include "../common/host_device.h"

namespace kdk::correlation {

// The moments of two vectors a and b, from which their means have been subtracted if the
// correlation is centred.
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
