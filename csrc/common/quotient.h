// SPDX-License-Identifier: Apache-2.0
// Divisions in the epilogues of CUDA kernels come from here. An IEEE division is nine instructions
// there and a call for numbers near an end of the range; where neither can be met, one reciprocal
// of the hardware is enough, which is within one unit in the last place.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace kdk {

// Returns a / b. On a GPU the result is within 2 units in the last place for a `b` that is 0,
// infinite, NaN, or of a magnitude from 2^-126 to 2^126. V is a number or a GCC vector of them.
template <typename V>
KDK_HOST_DEVICE V quotient(V a, V b) {
  return a / b;
}

#if defined(__CUDA_ARCH__)

template <>
__device__ __forceinline__ float quotient<float>(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return a * reciprocal;
}

#elif defined(KDK_CUDA_HOST)

// On the host the reciprocal is off by one unit more than its rounding, so that tests meet the
// worst that the hardware may do.
template <>
inline float quotient<float>(float a, float b) {
  union {
    float number;
    uint32_t bits;
  } reciprocal{1 / b};
  if (b - b == 0 && reciprocal.number - reciprocal.number == 0) reciprocal.bits ^= 1;
  return a * reciprocal.number;
}

#endif

}  // namespace kdk
