// SPDX-License-Identifier: Apache-2.0
// The CPU and CUDA kernels share this arithmetic of gram_mse. docs/ops/gram_mse.md derives it and
// explains the names.
#pragma once

#include <cmath>

#include "../common/rows_math.h"

namespace kdk::gram_mse {

enum class Normalize { kRowL2, kRowL1, kFeature, kNone };
enum class Algorithm { kResident, kStreamed, kFactored };

// Whether rows of the Gram are divided by their norm.
KDK_HOST_DEVICE bool is_row_normalized(Normalize normalize) {
  return normalize == Normalize::kRowL2 || normalize == Normalize::kRowL1;
}

inline constexpr int kMaxOrder = 8;  // of the Taylor polynomial
inline constexpr int kSums = 5;      // of a row: A^2, K^2, A K, |A|, |K|
inline constexpr int kCoefs = 5;     // of a row: a, b_s, b_t, c_s, c_t

struct RowResult {
  double loss;
  double coef[kCoefs];
};

// Returns one row of the loss and its coefficients, from the row's sums, for row_l2 (`l2`) or
// row_l1.
KDK_HOST_DEVICE RowResult normalized_row(const double sums[kSums], bool l2) {
  const double norm_s = l2 ? sqrt(sums[0]) : sums[3], norm_t = l2 ? sqrt(sums[1]) : sums[4];
  const double r = clamp_min(norm_s, kEps), q = clamp_min(norm_t, kEps);
  const double square_s = sums[0] / (r * r), square_t = sums[1] / (q * q),
               cross = sums[2] / (r * q);
  // <dG_i, G_i> / 2, which the normalisation takes back from the gradient; nothing where the clamp
  // holds the norm
  const double back_s = norm_s >= kEps ? square_s - cross : 0,
               back_t = norm_t >= kEps ? square_t - cross : 0;
  RowResult row;
  row.loss = clamp_min(square_s + square_t - 2 * cross, 0);
  row.coef[0] = -2 / (r * q);
  row.coef[1] = 2 * (l2 ? 1 - back_s : 1) / (r * r);
  row.coef[2] = 2 * (l2 ? 1 - back_t : 1) / (q * q);
  row.coef[3] = l2 ? 0 : -2 * back_s / r;
  row.coef[4] = l2 ? 0 : -2 * back_t / q;
  return row;
}

// The coefficients of every row where rows are not normalised: the derivative of sum (A - K)^2.
inline constexpr double kUniformCoef[kCoefs] = {-2, 2, 2, 0, 0};

// The polynomial of a Gram entry that stands for the Gaussian kernel, and its derivative.
template <typename T>
struct Taylor {
  T coefficient[kMaxOrder + 1];
  int order;

  Taylor() = default;

  Taylor(double gamma, int order_) : order(order_) {
    double c = std::exp(-2 * gamma);
    for (int p = 0; p <= kMaxOrder; ++p) {
      coefficient[p] = p <= order ? static_cast<T>(c) : T(0);
      c *= 2 * gamma / (p + 1);
    }
  }

  // Leaves out the constant term: only differences of values are used, and they keep more digits
  // without it.
  KDK_HOST_DEVICE T value(T s) const {
    T v = coefficient[order];
    for (int p = order - 1; p >= 1; --p) v = v * s + coefficient[p];
    return v * s;
  }

  KDK_HOST_DEVICE T slope(T s) const {
    T v = T(order) * coefficient[order];
    for (int p = order - 1; p >= 1; --p) v = v * s + T(p) * coefficient[p];
    return v;
  }
};

template <typename T>
KDK_HOST_DEVICE T sign(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x;  // NaN stays NaN
}

// Returns dloss/dA_ij + dloss/dA_ji, the weight of features j in the gradient of features i. `side`
// is the Gram entry of the side that the gradient is for, and b and c are that side's coefficients.
template <typename T>
KDK_HOST_DEVICE T linear_weight(T side, T other, T a_i, T a_j, T b_i, T b_j, T c_i, T c_j) {
  return (b_i + b_j) * side + (a_i + a_j) * other + (c_i + c_j) * sign(side);
}

template <typename T>
KDK_HOST_DEVICE T taylor_weight(T side, T other, const Taylor<T>& f) {
  return T(4) * (f.value(side) - f.value(other)) * f.slope(side);
}

}  // namespace kdk::gram_mse
