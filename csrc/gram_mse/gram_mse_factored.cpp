// SPDX-License-Identifier: Apache-2.0
// In the factored algorithm every B x B product becomes products with D x D factors, which are
// swept by panels of rows.
#include <algorithm>
#include <vector>

#include "../common/gemm.h"
#include "../common/integers.h"
#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "gram_mse_cpu.h"

namespace kdk::gram_mse {
namespace {

constexpr int64_t kPanel = 256;  // rows of features multiplied with the factors at a time

// The block-upper triangle of a symmetric matrix with the blocks above the diagonal doubled, so
// that x^T F x = sum_j x_j (x U)_j takes little more than half of the products.
constexpr int64_t kFold = 128;

template <typename T>
void fold(Matrix<const T> factor, Matrix<T> folded) {
  for (int64_t i = 0; i < factor.rows; ++i) {
    const int64_t diagonal = std::min((i / kFold + 1) * kFold, factor.cols);
    std::copy_n(factor.row(i), diagonal, folded.row(i));
    for (int64_t j = diagonal; j < factor.cols; ++j) folded.row(i)[j] = 2 * factor.row(i)[j];
  }
}

// out = x U, reading only the block-upper triangle
template <typename T>
void multiply_folded(Matrix<const T> x, Matrix<const T> folded, Matrix<T> out) {
  for (int64_t j0 = 0; j0 < folded.cols; j0 += kFold) {
    const int64_t n = std::min(kFold, folded.cols - j0);
    gemm<T>(x.block(0, x.rows, 0, j0 + n), folded.block(0, j0 + n, j0, n),
            out.block(0, x.rows, j0, n));
  }
}

// Row sums from the factors: r^2 = s^T C s, q^2 = t^T K t, x = t^T M s.
template <typename T>
void quadratic_forms(const Forward<T>& call, double* sums) {
  const auto &s = call.student, &t = call.teacher;
  const int64_t B = s.rows, D_s = s.cols, D_t = t.cols, widest = std::max(D_s, D_t);
  const Scratch<T> factors(D_s * D_s + D_t * D_t);
  const auto folded_s = Matrix<T>::contiguous(factors.data(), D_s, D_s);
  const auto folded_t = Matrix<T>::contiguous(factors.data() + D_s * D_s, D_t, D_t);
  fold<T>(call.gram_student, folded_s);
  fold<T>(call.gram_teacher, folded_t);
  const Scratch<T> scratch(thread_slots() * kPanel * widest);
  const auto& loops = rows::loops<T>();
  const double ops = 2.0 * kPanel * (D_s * D_s / 2 + D_t * D_t / 2 + D_s * D_t);
  parallel_each(ceil_div(B, kPanel), ops, [&](int64_t p) {
    const int64_t i0 = p * kPanel, n = std::min(kPanel, B - i0);
    T* memory = scratch.data() + thread_index() * kPanel * widest;
    const auto s_panel = s.row_block(i0, n), t_panel = t.row_block(i0, n);
    const auto for_s = Matrix<T>::contiguous(memory, n, D_s),
               for_t = Matrix<T>::contiguous(memory, n, D_t);
    const auto dots = [&](Matrix<const T> product, Matrix<const T> with, int which) {
      for (int64_t i = 0; i < n; ++i) {
        sums[(i0 + i) * kSums + which] = loops.dot(product.row(i), with.row(i), with.cols);
      }
    };
    multiply_folded<T>(s_panel, folded_s, for_s);
    dots(for_s, s_panel, 0);
    multiply_folded<T>(t_panel, folded_t, for_t);
    dots(for_t, t_panel, 1);
    gemm<T>(t_panel, call.cross, for_s);
    dots(for_s, s_panel, 2);
  });
}

template <typename T>
double squared_norm(Matrix<const T> m) {
  double sum = 0;
  for (int64_t i = 0; i < m.rows; ++i) sum += rows::loops<T>().dot(m.row(i), m.row(i), m.cols);
  return sum;
}

template <typename T>
void copy(Matrix<const T> from, Matrix<T> to) {
  for (int64_t i = 0; i < from.rows; ++i) {
    const T* row = from.row(i);
    if (from.col_stride == 1) {
      std::copy_n(row, from.cols, to.row(i));
    } else {
      for (int64_t j = 0; j < from.cols; ++j) to.row(i)[j] = row[j * from.col_stride];
    }
  }
}

// rows of `to` are factor[i] times rows of `from`
template <typename T>
void scale_rows(Matrix<const T> from, const double* factor, Matrix<T> to) {
  for (int64_t i = 0; i < from.rows; ++i)
    rows::loops<T>().scale(from.row(i), static_cast<T>(factor[i]), to.row(i), from.cols);
}

}  // namespace

template <typename T>
void factored_forward(const Forward<T>& call, const Options& options) {
  const auto s = call.student.t(), t = call.teacher.t();
  grams<T>({{s, s, call.gram_student, true},
            {t, t, call.gram_teacher, true},
            {t, s, call.cross, false}});
  if (options.normalize == Normalize::kRowL2) {
    std::vector<double> sums(call.student.rows * kSums);
    quadratic_forms(call, sums.data());
    finish_rows(call, sums.data(), true);
    return;
  }
  const double loss = squared_norm<T>(call.gram_student) + squared_norm<T>(call.gram_teacher) -
                      2 * squared_norm<T>(call.cross);
  *call.loss = static_cast<T>(clamp_min(loss, 0));
  uniform_coef(call.coef);
}

// dX = [b X, X, a Y, Y] [F; X^T (b X); M; Y^T (a X)] with X the side that the gradient is for, Y
// the other, F = X^T X and M = Y^T X: one product a panel. With uniform coefficients b X F repeats
// itself, and dX = [2 b X, 2 a Y] [F; M].
template <typename T>
void factored_backward(const Backward<T>& call, const Options& options) {
  const auto &x = call.side, &y = call.other;
  const int64_t B = x.rows, D = x.cols, D_y = y.cols;
  const bool uniform = options.normalize != Normalize::kRowL2;
  const int64_t depth = (uniform ? 1 : 2) * (D + D_y);
  const Scratch<T> stack(depth * D);
  const auto stacked = Matrix<T>::contiguous(stack.data(), depth, D);
  int64_t row = 0;
  const auto next = [&](int64_t rows) {
    row += rows;
    return stacked.row_block(row - rows, rows);
  };
  copy<T>(call.gram_side, next(D));
  copy<T>(call.cross, next(D_y));
  if (!uniform) {
    const Scratch<T> scaled(2 * B * D);
    const auto bx = Matrix<T>::contiguous(scaled.data(), B, D);
    const auto ax = Matrix<T>::contiguous(scaled.data() + B * D, B, D);
    parallel_each(ceil_div(B, kPanel), 2.0 * kPanel * D, [&](int64_t p) {
      const int64_t i0 = p * kPanel, n = std::min(kPanel, B - i0);
      scale_rows<T>(x.row_block(i0, n), call.b + i0, bx.row_block(i0, n));
      scale_rows<T>(x.row_block(i0, n), call.a + i0, ax.row_block(i0, n));
    });
    const auto side = next(D), other = next(D_y);
    grams<T>({{x.t(), bx.t(), side, true}, {y.t(), ax.t(), other, false}});
  }
  const Scratch<T> panels(thread_slots() * kPanel * depth);
  parallel_each(ceil_div(B, kPanel), 2.0 * kPanel * depth * D, [&](int64_t p) {
    const int64_t i0 = p * kPanel, n = std::min(kPanel, B - i0);
    const auto panel =
        Matrix<T>::contiguous(panels.data() + thread_index() * kPanel * depth, n, depth);
    const auto x_panel = x.row_block(i0, n), y_panel = y.row_block(i0, n);
    scale_rows<T>(x_panel, call.b + i0, panel.block(0, n, 0, D));
    scale_rows<T>(y_panel, call.a + i0, panel.block(0, n, D, D_y));
    if (!uniform) {
      copy<T>(x_panel, panel.block(0, n, D + D_y, D));
      copy<T>(y_panel, panel.block(0, n, 2 * D + D_y, D_y));
    }
    const auto gradient = call.gradient.row_block(i0, n);
    gemm<T>(panel, stacked, gradient);
    for (int64_t i = 0; uniform && i < n; ++i)
      rows::loops<T>().scale(gradient.row(i), T(2), gradient.row(i), D);
  });
}

#define KDK_INSTANTIATE(T)                                              \
  template void factored_forward<T>(const Forward<T>&, const Options&); \
  template void factored_backward<T>(const Backward<T>&, const Options&);
KDK_INSTANTIATE(float)
KDK_INSTANTIATE(double)
#undef KDK_INSTANTIATE

}  // namespace kdk::gram_mse
