// SPDX-License-Identifier: Apache-2.0
// Operands in memory are made of these elements.
#pragma once

#include <bit>

#include "operand.h"

namespace kdk::cuda {

struct bf16_t {
  uint16_t bits;
};
struct fp16_t {
  uint16_t bits;
};

__host__ __device__ __forceinline__ float to_float(float x) { return x; }

#if defined(KDK_CUDA_HOST)

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float to_float(fp16_t x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline fp16_t from_float<fp16_t>(float x) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}
template <>
inline bf16_t from_float<bf16_t>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // stays NaN
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// Rounds to the nearest tf32, and ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

#else

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float to_float(fp16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ fp16_t from_float<fp16_t>(float x) {
  fp16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ bf16_t from_float<bf16_t>(float x) {
  bf16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

#endif

__device__ __forceinline__ float to_float(bf16_t x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}

template <Math kMath>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<Math::kBFloat16> {
  using type = bf16_t;
};
template <>
struct ElementOf<Math::kFloat16> {
  using type = fp16_t;
};
template <Math kMath>
using Element = typename ElementOf<kMath>::type;

// Calls f.template operator()<kMath>() for the kMath that `math` is.
template <typename F>
void for_math(Math math, const F& f) {
  switch (math) {
    case Math::kBFloat16: return f.template operator()<Math::kBFloat16>();
    case Math::kFloat16: return f.template operator()<Math::kFloat16>();
    case Math::kTf32x3: return f.template operator()<Math::kTf32x3>();
    case Math::kIeee: return f.template operator()<Math::kIeee>();
  }
}

// Does the same where features of fp16 come as fp32.
template <typename F>
void for_wide_math(Math math, const F& f) {
  switch (math) {
    case Math::kBFloat16: return f.template operator()<Math::kBFloat16>();
    case Math::kTf32x3: return f.template operator()<Math::kTf32x3>();
    default: return f.template operator()<Math::kIeee>();
  }
}

}  // namespace kdk::cuda
