// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
#include "triplet_all_simd.h"

#include <type_traits>

#include "../common/host_device.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::triplet_all::KDK_SIMD_LEVEL {
namespace {

template <typename T>
using Bits = std::make_unsigned_t<Count<T>>;

template <typename T>
int64_t few(const T* d, T margin, int64_t n, const T* thresholds, int64_t P, T* weight,
            double* slots, double* sum) {
  int64_t active = 0;
  for (int64_t j = 0; j < n; ++j) weight[j] = 0;
  for (int64_t p = 0; p < P; p += 4) {
    T t[4];
    for (int64_t k = 0; k < 4; ++k)
      t[k] = p + k < P ? thresholds[p + k] : -static_cast<T>(__builtin_inf());
    const T t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3];
    Count<T> n0 = 0, n1 = 0, n2 = 0, n3 = 0;
#pragma omp simd reduction(+ : n0, n1, n2, n3)
    for (int64_t j = 0; j < n; ++j) {
      const T e = d[j] - margin;
      const Count<T> a0 = t0 > e, a1 = t1 > e, a2 = t2 > e, a3 = t3 > e;
      n0 += a0;
      n1 += a1;
      n2 += a2;
      n3 += a3;
      weight[j] -= static_cast<T>((a0 + a1) + (a2 + a3));
    }
    if (n0 == 0) break;  // the rest of the thresholds are no larger
    if (p == 0) active = n0;
    const Count<T> found[4] = {n0, n1, n2, n3};
    for (int64_t k = 0; k < 4 && p + k < P; ++k) slots[p + k] += found[k];
  }
  if (active == 0) return 0;
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j)
    total -= static_cast<double>(weight[j]) * static_cast<double>(d[j] - margin);
  *sum += total;
  return active;
}

// at_j = number of the P >= 1 thresholds above e_j, or not below it: bisection in step.
template <typename T, bool kAbove>
void positions(const T* e, int64_t n, const T* thresholds, int64_t P, int32_t* at) {
  for (int64_t j = 0; j < n; ++j) at[j] = 0;
  for (int64_t length = P; length > 0;) {
    const int32_t half = static_cast<int32_t>((length + 1) / 2);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T t = thresholds[at[j] + half - 1];
      at[j] += (kAbove ? t > e[j] : t >= e[j]) ? half : 0;
    }
    length -= half;
  }
}

template <typename T>
int64_t many(const T* d, T margin, int64_t n, const T* thresholds, int64_t P, T* weight,
             double* slots, double* sum) {
  T e[kStretch];
  int32_t at[kStretch];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) e[j] = d[j] - margin;
  positions<T, true>(e, n, thresholds, P, at);
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    weight[j] = -static_cast<T>(at[j]);
    total += static_cast<double>(at[j]) * static_cast<double>(e[j]);
  }
  int64_t active = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (at[j] == 0) continue;
    ++active;
    slots[at[j] - 1] += 1;
  }
  if (active > 0) *sum += total;
  return active;
}

// sum_k c_k x^k
template <int kTerms, int k = 0, typename T, typename F>
KDK_HOST_DEVICE T polynomial(T x, F coefficient) {
  constexpr T c = coefficient(k);
  if constexpr (k + 1 == kTerms) {
    return c;
  } else {
    return c + x * polynomial<kTerms, k + 1>(x, coefficient);
  }
}

template <typename T>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr int kMantissa = 23, kExpTerms = 8, kLogTerms = 8;
  static constexpr float kLargest = 110;  // where e^-x is 0
  static constexpr float kLn2High = 0x1.62e4p-1f;
};
template <>
struct Exponent<double> {
  static constexpr int kMantissa = 52, kExpTerms = 14, kLogTerms = 17;
  static constexpr double kLargest = 760;
  static constexpr double kLn2High = 0x1.62e42fep-1;
};

// 2^k for a whole number k: the sum with `round`, 1.5 * 2^mantissa, ends in k, and shifted to the
// exponent it is added to that of 1.
template <typename T>
KDK_HOST_DEVICE T power_of_two(T k, T round) {
  const Bits<T> bits = __builtin_bit_cast(Bits<T>, k + round) << Exponent<T>::kMantissa;
  return __builtin_bit_cast(T, bits + __builtin_bit_cast(Bits<T>, T(1)));
}

KDK_HOST_DEVICE float absolute(float x) { return __builtin_fabsf(x); }
KDK_HOST_DEVICE double absolute(double x) { return __builtin_fabs(x); }

// e^-x for 0 <= x <= kLargest: with k = round(x / ln 2) and r = k ln 2 - x, 2^-k times the power
// series of e^r, |r| <= ln(2) / 2. Written out because libm's is not vectorised.
template <typename T>
KDK_HOST_DEVICE T exp_minus(T x) {
  using E = Exponent<T>;
  constexpr T kRound = T(1.5) * static_cast<T>(Bits<T>(1) << E::kMantissa);
  constexpr long double kLn2 = 0.693147180559945309417232121458176568L;
  constexpr T kLow = static_cast<T>(kLn2 - E::kLn2High);
  const T k = (kRound - x * static_cast<T>(1 / kLn2)) - kRound;  // not positive
  const T r = (-x - k * E::kLn2High) - k * kLow;
  const T series = polynomial<E::kExpTerms>(r, [](int n) {
    T factorial = 1;
    for (int i = 2; i <= n; ++i) factorial *= i;
    return 1 / factorial;
  });
  // in two halves, so that results below the normal numbers are rounded as any
  const T half = (k * T(0.5) + kRound) - kRound;
  return series * power_of_two(half, kRound) * power_of_two(k - half, kRound);
}

// log(1 + z) for 0 <= z <= 1: twice the area tangent of s = z / (2 + z) <= 1/3.
template <typename T>
KDK_HOST_DEVICE T log_of_one_plus(T z) {
  const T s = z / (T(2) + z);
  return T(2) * s * polynomial<Exponent<T>::kLogTerms>(s * s, [](int n) {
           return T(1) / static_cast<T>(2 * n + 1);
         });
}

template <typename T>
int64_t soft(const T* d, T margin, int64_t n, const T* thresholds, int64_t P, T* weight,
             double* slots, double* sum) {
  constexpr int64_t kChunk = 32;  // thresholds whose derivatives are added up apart, for precision
  T u[kStretch], z[kStretch], part[kStretch];
  int64_t nonzero = 0;
  for (int64_t j = 0; j < n; ++j) weight[j] = 0;
  for (int64_t p0 = 0; p0 < P; p0 += kChunk) {
    for (int64_t j = 0; j < n; ++j) part[j] = 0;
    for (int64_t p = p0; p < P && p < p0 + kChunk; ++p) {
      const T t = thresholds[p];
      T losses = 0, slopes = 0;
      Count<T> above = 0;
      // Apart, because compilers turn the choices of one long loop into branches, which are scalar.
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        u[j] = (t - d[j]) + margin;
        const T size = absolute(u[j]);
        z[j] = size < Exponent<T>::kLargest ? size : Exponent<T>::kLargest;
      }
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) z[j] = exp_minus(z[j]);
#pragma omp simd reduction(+ : losses, slopes, above)
      for (int64_t j = 0; j < n; ++j) {
        const T slope = (u[j] < T(0) ? z[j] : T(1)) / (T(1) + z[j]);
        const T loss = T(0.5) * (u[j] + absolute(u[j])) + log_of_one_plus(z[j]);
        losses += loss;
        slopes += slope;
        above += loss > T(0);
        part[j] += slope;
      }
      *sum += static_cast<double>(losses);
      slots[p] += static_cast<double>(slopes);
      nonzero += above;
    }
    for (int64_t j = 0; j < n; ++j) weight[j] -= part[j];
  }
  return nonzero;
}

template <typename T>
void not_below(const T* d, int64_t n, const T* thresholds, int64_t P, int32_t* at) {
  positions<T, false>(d, n, thresholds, P, at);
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {few<T>, many<T>, soft<T>, not_below<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::triplet_all::KDK_SIMD_LEVEL
