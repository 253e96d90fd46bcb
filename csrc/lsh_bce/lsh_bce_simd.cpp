// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
//
// fp-contract: fast, since no difference of two products is taken.
#include "lsh_bce_simd.h"

#include "../common/lanes.h"
#include "lsh_bce_math.h"

namespace kdk::lsh_bce::KDK_SIMD_LEVEL {
namespace {

using kdk::KDK_SIMD_LEVEL::kVectorBytes;
using kdk::KDK_SIMD_LEVEL::Lanes;

// Bits j ... j + kCount - 1 of `codes` as 0 or 1; j is a multiple of kCount.
template <typename T>
typename Lanes<T>::Vector bits(const uint8_t* codes, int64_t j) {
  using L = Lanes<T>;
  typename L::Integer word = codes[j >> 3] >> (j & 7);
  if constexpr (L::kCount > 8) word |= codes[(j >> 3) + 1] << 8;
  typename L::Integers lane;
  for (int i = 0; i < L::kCount; ++i) lane[i] = typename L::Integer(1) << i;
  return (word & lane) != 0 ? typename L::Vector{} + 1 : typename L::Vector{};
}

// Cross-entropies of one vector of projections; z becomes its derivatives if kGradient.
template <typename T, bool kGradient>
typename Lanes<T>::Vector step(T* z_ptr, const T* bias_ptr, const uint8_t* codes, int64_t j,
                               T factor) {
  using V = typename Lanes<T>::Vector;
  using I = typename Lanes<T>::Integers;
  const V z = *reinterpret_cast<const V*>(z_ptr + j) + *reinterpret_cast<const V*>(bias_ptr + j);
  const V y = bits<T>(codes, j);
  const V e = exp_minus<T, V, I>(z < T(0) ? -z : z);
  if constexpr (kGradient) *reinterpret_cast<V*>(z_ptr + j) = factor * slope<T>(z, y, e);
  return cross_entropy<T>(z, y, e);
}

template <typename T, bool kGradient>
double cross_entropy_of(T* z, const T* bias, const uint8_t* codes, int64_t n, T factor) {
  constexpr int kCount = Lanes<T>::kCount;
  typename Lanes<T>::Vector sum{};
  int64_t j = 0;
  for (; j + kCount <= n; j += kCount) sum += step<T, kGradient>(z, bias, codes, j, factor);
  double total = 0;
  for (int i = 0; i < kCount; ++i) total += sum[i];
  if (j < n) {  // through a buffer
    T rest[kCount] = {}, rest_bias[kCount] = {};
    uint8_t rest_codes[kVectorBytes / 8] = {};
    for (int64_t i = j; i < n; ++i) {
      rest[i - j] = z[i];
      rest_bias[i - j] = bias[i];
      rest_codes[(i - j) >> 3] |= (codes[i >> 3] >> (i & 7) & 1) << ((i - j) & 7);
    }
    const auto last = step<T, kGradient>(rest, rest_bias, rest_codes, 0, factor);
    for (int64_t i = j; i < n; ++i) {
      total += last[i - j];
      z[i] = rest[i - j];
    }
  }
  return total;
}

template <typename T>
double cross_entropy_sum(T* z, const T* bias, const uint8_t* codes, int64_t n, bool gradient,
                         T factor) {
  return gradient ? cross_entropy_of<T, true>(z, bias, codes, n, factor)
                  : cross_entropy_of<T, false>(z, bias, codes, n, factor);
}

template <typename T>
void pack(const T* z, const T* bias, int64_t n, uint8_t* codes) {
  constexpr int64_t kChunk = 64;
  for (int64_t j0 = 0; j0 < n; j0 += kChunk) {
    const int64_t count = n - j0 < kChunk ? n - j0 : kChunk;
    uint8_t positive[kChunk] = {};
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) positive[j] = z[j0 + j] + bias[j0 + j] > 0;
    for (int64_t byte = 0; byte < (count + 7) / 8; ++byte) {
      uint8_t code = 0;
      for (int bit = 0; bit < 8; ++bit) code |= positive[byte * 8 + bit] << bit;
      codes[j0 / 8 + byte] = code;
    }
  }
}

}  // namespace

template <typename T>
const Epilogues<T>& epilogues() {
  static constexpr Epilogues<T> table = {cross_entropy_sum<T>, pack<T>};
  return table;
}

template const Epilogues<float>& epilogues<float>();
template const Epilogues<double>& epilogues<double>();

}  // namespace kdk::lsh_bce::KDK_SIMD_LEVEL
