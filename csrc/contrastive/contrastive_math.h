// SPDX-License-Identifier: Apache-2.0
// This is the arithmetic of contrastive.
#pragma once

#include "../common/host_device.h"

namespace kdk::contrastive {

// Returns the misfit of a pair: the distance of two rows of one label, and what the distance of two
// rows of different labels lacks to the margin. The loss of the pair is half of the square of the
// misfit, and the derivative by the distance is plus or minus the misfit.
template <typename T>
KDK_HOST_DEVICE T misfit(T d, T margin, bool same_label) {
  if (same_label) return d;
  const T missing = margin - d;
  return missing < T(0) ? T(0) : missing;  // NaN stays
}

}  // namespace kdk::contrastive
