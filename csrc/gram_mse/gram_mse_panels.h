// SPDX-License-Identifier: Apache-2.0
// Features of one group as the factored algorithm multiplies them: in their own type where they
// lie, or in fp64, some rows at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/gemm.h"
#include "../common/integers.h"
#include "../common/parallel.h"
#include "../common/rows_simd.h"

namespace kdk::gram_mse {

inline constexpr int64_t kPanel = 256;  // rows multiplied with the factors at a time
// Elements of fp64 copies of features that are alive at a time: a bound on memory, and deep enough
// that the product of a chunk can be shared by cores.
inline constexpr int64_t kChunkElements = int64_t{1} << 21;

// T: of the features, C: of the products. With unit_rows, which widening alone supports, rows are
// divided by their norm as they are read.
template <typename T, typename C>
class Features {
 public:
  static constexpr bool kWiden = !std::is_same_v<T, C>;

  Features(Matrix<const T> x, bool unit_rows) : x_(x), inverse_norms_(unit_rows ? x.rows : 0) {
    parallel_each(inverse_norms_.size(), 2.0 * x.cols, [&](int64_t i) {
      const double squares = rows::loops<T>().dot(x.row(i), x.row(i), x.cols);
      inverse_norms_[i] = 1 / clamp_min(std::sqrt(squares), kEps);
    });
  }

  int64_t rows() const { return x_.rows; }
  int64_t cols() const { return x_.cols; }
  const T* row(int64_t i) const { return x_.row(i); }
  double row_factor(int64_t i) const { return inverse_norms_.empty() ? 1 : inverse_norms_[i]; }

  // Rows [i0, i0 + n): where they lie, or in `memory`, [n, cols].
  Matrix<const C> panel(int64_t i0, int64_t n, C* memory) const {
    if constexpr (!kWiden) {
      return x_.row_block(i0, n);
    } else {
      const auto wide = Matrix<C>::contiguous(memory, n, cols());
      write(i0, nullptr, wide);
      return wide;
    }
  }

  // to_i = weight[i0 + i] times row i0 + i; no weights: 1
  void write(int64_t i0, const double* weight, Matrix<C> to) const {
    for (int64_t i = 0; i < to.rows; ++i) {
      const double factor = weight == nullptr ? 1 : weight[i0 + i];
      if constexpr (kWiden) {
        rows::loops<T>().widen(row(i0 + i), factor * row_factor(i0 + i), to.row(i), cols());
      } else if (weight == nullptr) {
        std::copy_n(row(i0 + i), cols(), to.row(i));
      } else {
        rows::loops<T>().scale(row(i0 + i), static_cast<T>(factor), to.row(i), cols());
      }
    }
  }

 private:
  Matrix<const T> x_;
  std::vector<double> inverse_norms_;
};

// diag(weight) X; no weights: X
template <typename T, typename C>
struct Operand {
  const Features<T, C>& features;
  const double* weight;
};

// out = left^T right, of operands by their place in a list
template <typename C>
struct Contraction {
  int left, right;
  Matrix<C> out;
  bool symmetric;
};

// Products summed over all rows. What must be copied, since it is weighted or in another type, is
// copied in chunks of rows whose products are added up in order; a chunk's length depends on the
// shapes alone.
template <typename T, typename C>
void contract(const std::vector<Operand<T, C>>& operands,
              const std::vector<Contraction<C>>& products) {
  constexpr bool kWiden = Features<T, C>::kWiden;
  const int64_t B = operands[0].features.rows();
  int64_t width = 0, outputs = 0;
  for (const auto& [x, weight] : operands) width += kWiden || weight != nullptr ? x.cols() : 0;
  for (const auto& product : products) outputs += product.out.rows * product.out.cols;
  const int64_t fitting =
      round_up(std::max(kPanel, kChunkElements / std::max<int64_t>(width, 1)), kPanel);
  const int64_t chunk = kWiden ? std::min(B, fitting) : B;
  const Scratch<C> copies(chunk * width), partial(chunk < B ? outputs : 0);
  int64_t i0 = 0;
  do {
    const int64_t n = std::min(chunk, B - i0);
    std::vector<Matrix<const C>> views;
    std::vector<Matrix<C>> to;
    C* memory = copies.data();
    for (const auto& [x, weight] : operands) {
      const bool copied = kWiden || weight != nullptr;
      to.push_back(Matrix<C>::contiguous(copied ? memory : nullptr, n, x.cols()));
      memory += copied ? n * x.cols() : 0;
      if constexpr (kWiden) {
        views.push_back(to.back());
      } else {
        views.push_back(copied ? Matrix<const C>(to.back()) : x.panel(0, n, nullptr));
      }
    }
    parallel_each(ceil_div(n, kPanel), 1.0 * kPanel * width, [&](int64_t p) {
      const int64_t r0 = p * kPanel, rows = std::min(kPanel, n - r0);
      for (size_t k = 0; k < operands.size(); ++k) {
        if (to[k].data == nullptr) continue;
        operands[k].features.write(i0 + r0, operands[k].weight, to[k].row_block(r0, rows));
      }
    });
    std::vector<Gram<C>> jobs;
    C* sums = partial.data();
    for (const auto& [left, right, out, symmetric] : products) {
      const auto result = i0 == 0 ? out : Matrix<C>::contiguous(sums, out.rows, out.cols);
      sums += i0 == 0 ? 0 : out.rows * out.cols;
      jobs.push_back({views[left].t(), views[right].t(), result, symmetric});
    }
    grams<C>(jobs);
    for (size_t k = 0; k < products.size() && i0 > 0; ++k) {
      const auto &from = jobs[k].out, &out = products[k].out;
      parallel_each(out.rows, 1.0 * out.cols,
                    [&](int64_t i) { rows::loops<C>().add(from.row(i), out.row(i), out.cols); });
    }
    i0 += chunk;
  } while (i0 < B);
}

}  // namespace kdk::gram_mse
