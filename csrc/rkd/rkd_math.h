// SPDX-License-Identifier: Apache-2.0
// This is the arithmetic of rkd.
#pragma once

#include "../common/host_device.h"

namespace kdk::rkd {

// Returns the derivative of huber(e), which is e^2 / 2 where |e| < 1 and |e| - 1/2 elsewhere. Takes
// scalars or vectors of them. NaN stays NaN.
template <typename V>
KDK_HOST_DEVICE V huber_slope(V e) {
  const V one = V{} + 1;
  e = e > one ? one : e;
  return e < -one ? -one : e;
}

// Returns huber(e), given its derivative g.
template <typename V>
KDK_HOST_DEVICE V huber(V e, V g) {
  return g * (e - g / 2);
}

}  // namespace kdk::rkd
