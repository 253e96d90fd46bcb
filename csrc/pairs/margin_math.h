// SPDX-License-Identifier: Apache-2.0
// The CPU and CUDA kernels of triplets share this arithmetic of one of them.
#pragma once

#include <cmath>

#include "../common/quotient.h"

namespace kdk::pairs {

template <typename T>
struct Term {
  T loss, slope;  // f(u) and f'(u)
};

// Returns the hinge at u = d_ap - d_an + margin. The loss is NaN where u is.
template <typename T>
KDK_HOST_DEVICE Term<T> hinge(T u) {
  return {u <= 0 ? T(0) : u, u > 0 ? T(1) : T(0)};
}

// Returns log(1 + e^u) and its derivative.
template <typename T>
KDK_HOST_DEVICE Term<T> softplus(T u) {
  const T z = std::exp(-std::abs(u));
  return {(u <= 0 ? T(0) : u) + std::log1p(z), quotient<T>(u < 0 ? z : T(1), 1 + z)};
}

}  // namespace kdk::pairs
