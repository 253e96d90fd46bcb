// SPDX-License-Identifier: Apache-2.0
// The arithmetic of contrastive, shared by the CPU and CUDA kernels.
#pragma once

#include "../common/host_device.h"

namespace kdk::contrastive {

// The loss of a pair is half of the square of this, and its derivative by the distance plus or
// minus this: the distance of two rows of one label, else what is missing to the margin.
template <typename T>
KDK_HOST_DEVICE T misfit(T d, T margin, bool same_label) {
  if (same_label) return d;
  const T missing = margin - d;
  return missing < T(0) ? T(0) : missing;  // NaN stays
}

}  // namespace kdk::contrastive
