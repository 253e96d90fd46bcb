// SPDX-License-Identifier: Apache-2.0
// The arithmetic of rows that several ops need, shared by the CPU and CUDA kernels.
#pragma once

#include <limits>

#include "host_device.h"

namespace kdk {

// A row counts as not finite when its squared norm is not below this: distances of rows below it,
// and the terms of |x|^2 + |y|^2 - 2 <x, y>, cannot overflow.
template <typename T>
inline constexpr T kNormLimit = std::numeric_limits<T>::max() / 4;

inline constexpr double kEps = 1e-12;  // the clamp of F.normalize, on the norm

// max(x, floor) that keeps NaN, as torch.clamp_min does.
KDK_HOST_DEVICE double clamp_min(double x, double floor) { return x < floor ? floor : x; }

}  // namespace kdk
