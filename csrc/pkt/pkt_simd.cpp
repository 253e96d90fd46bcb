// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h). Sums are in T over a tile
// and in fp64 beyond.
#include "pkt_simd.h"

#include "../common/lanes.h"

namespace kdk::pkt::KDK_SIMD_LEVEL {
namespace {

using namespace kdk::KDK_SIMD_LEVEL;

template <typename T>
using Integers = typename Lanes<T>::Integers;

template <typename T>
inline __attribute__((always_inline)) Vector<T> root(Vector<T> x) {
  for (int i = 0; i < kCount<T>; ++i) {
    x[i] = sizeof(T) == sizeof(float) ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
  }
  return x;
}

template <bool kFull, typename T>
inline __attribute__((always_inline)) void add_to(T* sums, Vector<T> x, int64_t count) {
  store<kFull, T>(sums, load<kFull>(sums, count) + x, count);
}

template <typename T>
void cosines(Matrix<T> x, const T* self_i, const T* self_j) {
  for (int64_t i = 0; i < x.rows; ++i) {
    T* row = x.row(i);
    each_vector<T>(x.cols, [&]<bool kFull>(int64_t j, int64_t count) {
      const Vector<T> product = load<kFull>(row + j, count), self = load<kFull>(self_j + j, count);
      store<kFull, T>(row + j, cosine_similarity<T>(product, self_i[i], self), count);
    });
  }
}

template <typename T>
void student_t(T* x, T* distance, int64_t n) {
  each_vector<T>(n, [&]<bool kFull>(int64_t j, int64_t count) {
    const Vector<T> d = root<T>(load<kFull>(x + j, count) + static_cast<T>(kDistanceEps));
    store<kFull, T>(x + j, 1 / (1 + d), count);
    if (distance) store<kFull, T>(distance + j, d, count);
  });
}

template <typename T>
void sums(Matrix<const T> k, double* rows, T* cols) {
  for (int64_t i = 0; i < k.rows; ++i) {
    const T* row = k.row(i);
    Vector<T> total{};
    each_vector<T>(k.cols, [&]<bool kFull>(int64_t j, int64_t count) {
      const Vector<T> x = load<kFull>(row + j, count);
      total += x;
      if (cols) add_to<kFull, T>(cols + j, x, count);
    });
    rows[i] += sum<T>(total);
  }
}

template <typename T, Divergence kDivergence, bool kCols>
double loss_of(Matrix<const T> k_s, Matrix<const T> k_t, const Stretch<T>& in_i,
               const Stretch<T>& in_j, double* rows, T* cols) {
  double loss = 0;
  for (int64_t i = 0; i < k_s.rows; ++i) {
    const T *s = k_s.row(i), *t = k_t.row(i);
    const T inverse_s = in_i.inverse[0][i], inverse_t = in_i.inverse[1][i];
    Vector<T> value{}, r{};
    each_vector<T>(k_s.cols, [&]<bool kFull>(int64_t j, int64_t count) {
      const Vector<T> a = load<kFull>(s + j, count), b = load<kFull>(t + j, count);
      const Vector<T> p = a * inverse_s, q = b * inverse_t;
      Vector<T> v = term<kDivergence, T, Vector<T>, Integers<T>>(p, q);
      const Vector<T> g = p * slope<kDivergence, T, Vector<T>, Integers<T>>(p, q);
      r += within<kFull, T>(g, count, 0);
      if constexpr (kCols) {
        const Vector<T> across_p = a * load<kFull>(in_j.inverse[0] + j, count),
                        across_q = b * load<kFull>(in_j.inverse[1] + j, count);
        v += term<kDivergence, T, Vector<T>, Integers<T>>(across_p, across_q);
        const Vector<T> across =
            across_p * slope<kDivergence, T, Vector<T>, Integers<T>>(across_p, across_q);
        add_to<kFull, T>(cols + j, across, count);
      }
      value += within<kFull, T>(v, count, 0);
    });
    loss += sum<T>(value);
    rows[i] += sum<T>(r);
  }
  return loss;
}

template <typename T>
double loss(Matrix<const T> k_s, Matrix<const T> k_t, const Stretch<T>& i, const Stretch<T>& j,
            Divergence divergence, double* rows, T* cols) {
  constexpr auto kKl = Divergence::kKl, kJeffreys = Divergence::kJeffreys;
  const auto run = divergence == kKl
                       ? (cols ? loss_of<T, kKl, true> : loss_of<T, kKl, false>)
                       : (cols ? loss_of<T, kJeffreys, true> : loss_of<T, kJeffreys, false>);
  return run(k_s, k_t, i, j, rows, cols);
}

template <typename T, Divergence kDivergence, bool kDistance>
void weights_of(Matrix<T> k_s, Matrix<const T> k_t, const Matrix<T>* distance,
                const Stretch<T>& in_i, const Stretch<T>& in_j, double* rows, T* cols) {
  for (int64_t i = 0; i < k_s.rows; ++i) {
    T* s = k_s.row(i);
    const T* t = k_t.row(i);
    const T* d = kDistance ? distance->row(i) : nullptr;
    const T inverse_s = in_i.inverse[0][i], inverse_t = in_i.inverse[1][i];
    const T r_i = kDistance ? in_i.r[i] : T(0);
    Vector<T> total{};
    each_vector<T>(k_s.cols, [&]<bool kFull>(int64_t j, int64_t count) {
      const Vector<T> a = load<kFull>(s + j, count), b = load<kFull>(t + j, count);
      const Vector<T> across_s = load<kFull>(in_j.inverse[0] + j, count),
                      across_t = load<kFull>(in_j.inverse[1] + j, count);
      Vector<T> g = slope<kDivergence, T, Vector<T>, Integers<T>>(a * inverse_s, b * inverse_t);
      Vector<T> across = slope<kDivergence, T, Vector<T>, Integers<T>>(a * across_s, b * across_t);
      if constexpr (kDistance) {
        g -= r_i;
        across -= load<kFull>(in_j.r + j, count);
      }
      Vector<T> w = g * inverse_s + across * across_s;
      if constexpr (kDistance) {
        w *= student_t_slope(a, load<kFull>(d + j, count));
        w = within<kFull, T>(w, count, 0);
        total += w;
        if (cols) add_to<kFull, T>(cols + j, w, count);
      }
      store<kFull>(s + j, w, count);
    });
    if constexpr (kDistance) rows[i] += sum<T>(total);
  }
}

template <typename T>
void weights(Matrix<T> k_s, Matrix<const T> k_t, const Matrix<T>* distance, const Stretch<T>& i,
             const Stretch<T>& j, Divergence divergence, double* rows, T* cols) {
  constexpr auto kKl = Divergence::kKl, kJeffreys = Divergence::kJeffreys;
  const auto run =
      distance ? (divergence == kKl ? weights_of<T, kKl, true> : weights_of<T, kJeffreys, true>)
               : (divergence == kKl ? weights_of<T, kKl, false> : weights_of<T, kJeffreys, false>);
  run(k_s, k_t, distance, i, j, rows, cols);
}

template <typename T>
void subtract_difference(double factor, const T* x, const T* y, T* sum, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const double difference = static_cast<double>(x[j]) - static_cast<double>(y[j]);
    sum[j] = static_cast<T>(static_cast<double>(sum[j]) - factor * difference);
  }
}

}  // namespace

template <typename T>
const Epilogues<T>& epilogues() {
  static constexpr Epilogues<T> table = {cosines<T>, student_t<T>, sums<T>,
                                         loss<T>,    weights<T>,   subtract_difference<T>};
  return table;
}

template const Epilogues<float>& epilogues<float>();
template const Epilogues<double>& epilogues<double>();

}  // namespace kdk::pkt::KDK_SIMD_LEVEL
