// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
//
// fp-contract: fast, since no difference of two products is taken.
#include "relational_kl_simd.h"

#include "../common/lanes.h"
#include "relational_kl_math.h"

namespace kdk::relational_kl::KDK_SIMD_LEVEL {
namespace {

using namespace kdk::KDK_SIMD_LEVEL;

template <typename T>
T maximum(T* a, const T* factors, int64_t n) {
  constexpr T kLeast = -__builtin_huge_valf();
  Vector<T> most = Vector<T>{} + kLeast;
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    Vector<T> x = load<kFull>(a + j, count);
    if (factors) {
      x *= load<kFull>(factors + j, count);
      store<kFull>(a + j, x, count);
    }
    x = within<kFull, T>(x, count, kLeast);
    most = x > most ? x : most;
  });
  T result = kLeast;
  for (int i = 0; i < kCount<T>; ++i) result = most[i] > result ? most[i] : result;
  return result;
}

template <typename T>
double weights(T* a, const T* factors, int64_t n, T max) {
  Vector<T> total{};
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    Vector<T> p = exp_of_negative<T>(load<kFull>(a + j, count) - max);
    total += within<kFull, T>(p, count, 0);
    if (factors) p *= load<kFull>(factors + j, count);
    store<kFull>(a + j, p, count);
  });
  return sum<T>(total);
}

template <typename T, bool kSubtractEntropy>
Sums both_weights_of(T* a, T* b, const T* factors, int64_t n, T max_a, T max_b) {
  Vector<T> student{}, teacher{}, mean{};
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    const Vector<T> x = load<kFull>(a + j, count) - max_a, y = load<kFull>(b + j, count) - max_b;
    Vector<T> q = exp_of_negative<T>(x), p = exp_of_negative<T>(y);
    const Vector<T> c = cost(y, x, kSubtractEntropy);
    student += within<kFull, T>(q, count, 0);
    teacher += within<kFull, T>(p, count, 0);
    mean += within<kFull, T>(p * c, count, 0);
    if (factors) {
      const Vector<T> f = load<kFull>(factors + j, count);
      q *= f;
      p *= f;
    }
    store<kFull>(a + j, q, count);
    store<kFull>(b + j, p, count);
  });
  return {sum<T>(student), sum<T>(teacher), sum<T>(mean)};
}

template <typename T>
Sums both_weights(T* a, T* b, const T* factors, int64_t n, T max_a, T max_b,
                  bool subtract_entropy) {
  return subtract_entropy ? both_weights_of<T, true>(a, b, factors, n, max_a, max_b)
                          : both_weights_of<T, false>(a, b, factors, n, max_a, max_b);
}

template <typename T>
void softmax(T* a, int64_t n, T lse, T dout) {
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    const Vector<T> q = exp_of_negative<T>(load<kFull>(a + j, count) - lse);
    store<kFull, T>(a + j, dout * q, count);
  });
}

template <typename T>
void derivatives(T* a, T* b, int64_t n, const Row<T>& row) {
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    const Vector<T> log_q = load<kFull>(a + j, count) - row.lse_student;
    const Vector<T> log_p = load<kFull>(b + j, count) - row.lse_teacher;
    const Vector<T> q = exp_of_negative<T>(log_q), p = exp_of_negative<T>(log_p);
    const Vector<T> c = cost(log_p, log_q, row.subtract_entropy);
    store<kFull, T>(a + j, row.dout * (q - p), count);
    store<kFull, T>(b + j, row.dout * by_teacher_logit(p, c, row.loss), count);
  });
}

template <typename T>
void multiply(T* x, const T* factors, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] *= factors[j];
}

template <typename T>
void add_scaled(const T* x, T factor, T* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] += factor * x[j];
}

}  // namespace

template <typename T>
const Epilogues<T>& epilogues() {
  static constexpr Epilogues<T> table = {maximum<T>,     weights<T>,  both_weights<T>, softmax<T>,
                                         derivatives<T>, multiply<T>, add_scaled<T>};
  return table;
}

template const Epilogues<float>& epilogues<float>();
template const Epilogues<double>& epilogues<double>();

}  // namespace kdk::relational_kl::KDK_SIMD_LEVEL
