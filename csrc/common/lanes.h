// SPDX-License-Identifier: Apache-2.0
// The `*_simd.cpp` (see simd.h) find here the widest vectors of the instruction set that they are
// compiled for.
#pragma once

#include <cstdint>

#include "exp_math.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::KDK_SIMD_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Lanes {
  static constexpr int kCount = kVectorBytes / sizeof(T);
  using Integer = typename ExpSeries<T>::Integer;
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T))));
  typedef Integer Integers __attribute__((vector_size(kVectorBytes), aligned(sizeof(Integer))));
};

template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
constexpr int kCount = Lanes<T>::kCount;

// Loads the first `count` lanes and sets the others to 0. With kFull, all lanes are loaded.
template <bool kFull, typename T>
inline __attribute__((always_inline)) Vector<T> load(const T* p, int64_t count) {
  if constexpr (kFull) return *reinterpret_cast<const Vector<T>*>(p);
  T rest[kCount<T>] = {};
  for (int64_t i = 0; i < count; ++i) rest[i] = p[i];
  return *reinterpret_cast<const Vector<T>*>(rest);
}

template <bool kFull, typename T>
inline __attribute__((always_inline)) void store(T* p, Vector<T> x, int64_t count) {
  if constexpr (kFull) {
    *reinterpret_cast<Vector<T>*>(p) = x;
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = x[i];
  }
}

// Keeps x in the first `count` lanes and puts `other` into the lanes behind them.
template <bool kFull, typename T>
inline __attribute__((always_inline)) Vector<T> within(Vector<T> x, int64_t count, T other) {
  if constexpr (kFull) return x;
  for (int64_t i = count; i < kCount<T>; ++i) x[i] = other;
  return x;
}

// exp(x), or 0 where the result would not be a normal number.
template <typename T>
inline __attribute__((always_inline)) Vector<T> exp_of_negative(Vector<T> x) {
  const Vector<T> e = exp_minus<T, Vector<T>, typename Lanes<T>::Integers>(-x);
  return x < -ExpSeries<T>::kLimit ? Vector<T>{} : e;
}

template <typename T>
inline __attribute__((always_inline)) double sum(Vector<T> x) {
  double total = 0;
  for (int i = 0; i < kCount<T>; ++i) total += x[i];
  return total;
}

// Calls step<kFull>(j, count) for each vector of n elements.
template <typename T, typename F>
inline __attribute__((always_inline)) void each_vector(int64_t n, const F& step) {
  int64_t j = 0;
  for (; j + kCount<T> <= n; j += kCount<T>) step.template operator()<true>(j, kCount<T>);
  if (j < n) step.template operator()<false>(j, n - j);
}

}  // namespace kdk::KDK_SIMD_LEVEL
