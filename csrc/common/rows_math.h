// SPDX-License-Identifier: Apache-2.0
// Several ops need this arithmetic of rows. The CPU and CUDA kernels share it.
#pragma once

#include <cstdint>
#include <limits>

#include "host_device.h"

namespace kdk {

// A row counts as not finite when its squared norm is not below this: distances of rows below it,
// and the terms of |x|^2 + |y|^2 - 2 <x, y>, cannot overflow.
template <typename T>
inline constexpr T kNormLimit = std::numeric_limits<T>::max() / 4;

// A squared distance below this share of |x|^2 + |y|^2 is computed again from differences.
//
// |x|^2 + |y|^2 - 2 <x, y> is off by some eps (|x|^2 + |y|^2), so at or above the share s a
// distance is relatively off by at most about eps / (2 s), 8 eps in fp32; and so is a weight
// (margin - d) / d times d, which is what a pair contributes to a gradient. A pair from differences
// costs as much as a few pairs of a product, so even where all pairs are close the sweep is only
// some times slower.
template <typename T>
inline constexpr T kClose = sizeof(T) == sizeof(float) ? T(1) / 16 : T(1) / 1024;

// How far |x|^2 + |y|^2 - 2 <x, y> of D columns may be off, relative to |x|^2 + |y|^2: sums of
// products are vectorised.
template <typename T>
KDK_HOST_DEVICE T product_tolerance(int64_t D) {
  return std::numeric_limits<T>::epsilon() * static_cast<T>(8 + D / 8);
}

inline constexpr double kEps = 1e-12;  // the clamp of F.normalize, on the norm

// Returns max(x, floor) and keeps NaN, as torch.clamp_min does.
KDK_HOST_DEVICE double clamp_min(double x, double floor) { return x < floor ? floor : x; }

// Returns a norm, and NaN for an infinite one, as of a finite row whose squares overflow: divided
// by infinity it would be a row of zeros.
KDK_HOST_DEVICE double no_infinity(double norm) {
  return norm <= std::numeric_limits<double>::max() ? norm
                                                    : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace kdk
