// SPDX-License-Identifier: Apache-2.0
// Numbers of 16 bits, widened to fp32 by arithmetic on their bits: exact, and the same on every
// processor.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace kdk {

// As they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// `bits` is a uint32_t or a vector of them, W, whose upper halves are 0; V is a float or a vector.
template <typename V, typename W>
KDK_HOST_DEVICE V widened(BFloat16, W bits) {
  union {
    W words;
    V number;
  } wide{bits << 16};
  return wide.number;
}

template <typename V, typename W>
KDK_HOST_DEVICE V widened(Half, W bits) {
  union Bits {
    W words;
    V number;
  };
  constexpr uint32_t kBias = 127 - 15;  // difference of the exponents' biases
  const W sign = (bits & 0x8000u) << 16, exponent = bits & 0x7c00u,
          magnitude = (bits & 0x7fffu) << 13;
  Bits subnormal{magnitude + ((kBias + 1) << 23)};  // 2^-14 plus the number
  subnormal.number -= 0x1p-14f;
  const W normal = magnitude + (kBias << 23), infinite_or_nan = magnitude | 0x7f800000u;
  Bits result{exponent == 0 ? subnormal.words : exponent == 0x7c00u ? infinite_or_nan : normal};
  result.words |= sign;
  return result.number;
}

}  // namespace kdk
