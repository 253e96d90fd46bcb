// SPDX-License-Identifier: Apache-2.0
// The factored algorithm: every B x B product becomes products with D x D factors, swept by panels
// of rows. For fp32 features it runs in fp64 unless the two sides are unrelated.
// docs/ops/gram_mse.md ("Accuracy") has the reason.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/gemm.h"
#include "../common/integers.h"
#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "gram_mse_cpu.h"
#include "gram_mse_panels.h"
#include "gram_mse_simd.h"

namespace kdk::gram_mse {
namespace {

// fp32 suffices from this difference on. It is 1 minus the mean cosine of the two sides' Gram rows:
// 0 at convergence, near 1 for unrelated normal features.
constexpr double kUnrelated = 0.6;
constexpr int64_t kSampleRows = 16, kSampleCols = 1024;  // of both Grams

// The block-upper triangle of a symmetric matrix with the blocks above the diagonal doubled, so
// that x^T F x = sum_j x_j (x U)_j takes little more than half of the products.
constexpr int64_t kFold = 128;

template <typename C>
void fold(Matrix<const C> factor, Matrix<C> folded) {
  for (int64_t i = 0; i < factor.rows; ++i) {
    const int64_t diagonal = std::min((i / kFold + 1) * kFold, factor.cols);
    std::copy_n(factor.row(i), diagonal, folded.row(i));
    for (int64_t j = diagonal; j < factor.cols; ++j) folded.row(i)[j] = 2 * factor.row(i)[j];
  }
}

// out = x U, reading only the block-upper triangle
template <typename C>
void multiply_folded(Matrix<const C> x, Matrix<const C> folded, Matrix<C> out) {
  for (int64_t j0 = 0; j0 < folded.cols; j0 += kFold) {
    const int64_t n = std::min(kFold, folded.cols - j0);
    gemm<C>(x.block(0, x.rows, 0, j0 + n), folded.block(0, j0 + n, j0, n),
            out.block(0, x.rows, j0, n));
  }
}

template <typename C>
struct Factors {
  Matrix<C> student, teacher, cross;  // C = S^T S, K = T^T T, M = T^T S
};

// Row sums from the factors: r^2 = s^T C s, q^2 = t^T K t, x = t^T M s.
template <typename T, typename C>
void quadratic_forms(const Features<T, C>& s, const Features<T, C>& t, const Factors<C>& factors,
                     double* sums) {
  const int64_t B = s.rows(), D_s = s.cols(), D_t = t.cols(), widest = std::max(D_s, D_t);
  const Scratch<C> folded(D_s * D_s + D_t * D_t);
  const auto folded_s = Matrix<C>::contiguous(folded.data(), D_s, D_s);
  const auto folded_t = Matrix<C>::contiguous(folded.data() + D_s * D_s, D_t, D_t);
  fold<C>(factors.student, folded_s);
  fold<C>(factors.teacher, folded_t);
  const int64_t copies = Features<T, C>::kWiden ? D_s + D_t : 0, size = kPanel * (widest + copies);
  const Scratch<C> scratch(thread_slots() * size);
  const auto& loops = rows::loops<C>();
  const double ops = 2.0 * kPanel * (D_s * D_s / 2 + D_t * D_t / 2 + D_s * D_t);
  parallel_each(ceil_div(B, kPanel), ops, [&](int64_t p) {
    const int64_t i0 = p * kPanel, n = std::min(kPanel, B - i0);
    C* memory = scratch.data() + thread_index() * size;
    const auto for_s = Matrix<C>::contiguous(memory, n, D_s),
               for_t = Matrix<C>::contiguous(memory, n, D_t);
    memory += kPanel * widest;
    const auto s_panel = s.panel(i0, n, memory), t_panel = t.panel(i0, n, memory + kPanel * D_s);
    const auto dots = [&](Matrix<const C> product, Matrix<const C> with, int which) {
      for (int64_t i = 0; i < n; ++i) {
        sums[(i0 + i) * kSums + which] = loops.dot(product.row(i), with.row(i), with.cols);
      }
    };
    multiply_folded<C>(s_panel, folded_s, for_s);
    dots(for_s, s_panel, 0);
    multiply_folded<C>(t_panel, folded_t, for_t);
    dots(for_t, t_panel, 1);
    gemm<C>(t_panel, factors.cross, for_s);
    dots(for_s, s_panel, 2);
  });
}

template <typename C>
double squared_norm(Matrix<const C> m) {
  double sum = 0;
  for (int64_t i = 0; i < m.rows; ++i) sum += rows::loops<C>().dot(m.row(i), m.row(i), m.cols);
  return sum;
}

template <typename From, typename To>
void copy(Matrix<const From> from, Matrix<To> to) {
  for (int64_t i = 0; i < from.rows; ++i) {
    const From* row = from.row(i);
    for (int64_t j = 0; j < from.cols; ++j)
      to.row(i)[j] = static_cast<To>(row[j * from.col_stride]);
  }
}

// Fills the factors and coef; returns the loss.
template <typename T, typename C>
double forward_in(Matrix<const T> student, Matrix<const T> teacher, const Factors<C>& factors,
                  Matrix<double> coef, Normalize normalize) {
  const bool unit_rows = Features<T, C>::kWiden && normalize == Normalize::kFeature;
  const Features<T, C> s(student, unit_rows), t(teacher, unit_rows);
  contract<T, C>(
      {{s, nullptr}, {t, nullptr}},
      {{0, 0, factors.student, true}, {1, 1, factors.teacher, true}, {1, 0, factors.cross, false}});
  if (normalize == Normalize::kRowL2) {
    std::vector<double> sums(s.rows() * kSums);
    quadratic_forms<T, C>(s, t, factors, sums.data());
    return finish_rows(coef, sums.data(), true);
  }
  uniform_coef(coef);
  const double loss = squared_norm<C>(factors.student) + squared_norm<C>(factors.teacher) -
                      2 * squared_norm<C>(factors.cross);
  return clamp_min(loss, 0);
}

// dX = [b X, X, a Y, Y] [F; X^T (b X); M; Y^T (a X)] with X the side that the gradient is for, Y
// the other, F = X^T X and M = Y^T X: one product a panel. With uniform coefficients b X F repeats
// itself, and dX = [2 b X, 2 a Y] [F; M].
template <typename T, typename F, typename C>
void backward_in(const Backward<T, F>& call, Normalize normalize) {
  constexpr bool kWiden = Features<T, C>::kWiden;
  const bool unit_rows = kWiden && normalize == Normalize::kFeature;
  const Features<T, C> x(call.side, unit_rows), y(call.other, unit_rows);
  const int64_t B = x.rows(), D = x.cols(), D_y = y.cols();
  const bool uniform = normalize != Normalize::kRowL2;
  std::vector<double> a(call.a, call.a + B), b(call.b, call.b + B);
  for (int64_t i = 0; uniform && i < B; ++i) a[i] *= 2, b[i] *= 2;
  const int64_t depth = (uniform ? 1 : 2) * (D + D_y);
  const Scratch<C> stack(depth * D);
  const auto stacked = Matrix<C>::contiguous(stack.data(), depth, D);
  int64_t row = 0;
  const auto next = [&](int64_t rows) {
    row += rows;
    return stacked.row_block(row - rows, rows);
  };
  copy<F, C>(call.gram_side, next(D));
  copy<F, C>(call.cross, next(D_y));
  if (!uniform) {
    const auto side = next(D), other = next(D_y);
    contract<T, C>({{x, nullptr}, {x, b.data()}, {y, nullptr}, {x, a.data()}},
                   {{0, 1, side, true}, {2, 3, other, false}});
  }
  const int64_t size = kPanel * (depth + (kWiden ? D : 0)) + (unit_rows ? D : 0);
  const Scratch<C> panels(thread_slots() * size);
  parallel_each(ceil_div(B, kPanel), 2.0 * kPanel * depth * D, [&](int64_t p) {
    const int64_t i0 = p * kPanel, n = std::min(kPanel, B - i0);
    C* memory = panels.data() + thread_index() * size;
    const auto panel = Matrix<C>::contiguous(memory, n, depth);
    x.write(i0, b.data(), panel.block(0, n, 0, D));
    y.write(i0, a.data(), panel.block(0, n, D, D_y));
    if (!uniform) {
      x.write(i0, nullptr, panel.block(0, n, D + D_y, D));
      y.write(i0, nullptr, panel.block(0, n, 2 * D + D_y, D_y));
    }
    const auto gradient = call.gradient.row_block(i0, n);
    if constexpr (!kWiden) {
      gemm<C>(panel, stacked, gradient);
    } else {
      const auto wide = Matrix<C>::contiguous(memory + kPanel * depth, n, D);
      gemm<C>(panel, stacked, wide);
      for (int64_t i = 0; i < n; ++i) {
        if (unit_rows) {
          C* features = memory + kPanel * (depth + D);
          rows::loops<T>().widen(x.row(i0 + i), 1, features, D);
          rows::loops<C>().normalize_backward(features, wide.row(i), D);
        }
        rows::loops<T>().narrow(wide.row(i), gradient.row(i), D);
      }
    }
  });
}

// Whether the sides are so far apart that fp32 will do, from 16 rows of both Grams.
bool look_unrelated(Matrix<const float> s, Matrix<const float> t) {
  const int64_t rows = std::min(s.rows, kSampleRows), cols = std::min(s.rows, kSampleCols);
  if (rows == 0) return true;
  const auto every = [](Matrix<const float> x, int64_t n, int64_t first) {
    const int64_t step = x.rows / n;
    return Matrix<const float>{x.row(first), n, x.cols, step * x.row_stride, x.col_stride};
  };
  // Between the columns, so that the diagonal, which is larger, has no more than its share.
  const int64_t first = s.rows / cols / 2;
  const Scratch<float> grams(2 * rows * cols);
  const auto of_student = Matrix<float>::contiguous(grams.data(), rows, cols);
  const auto of_teacher = Matrix<float>::contiguous(grams.data() + rows * cols, rows, cols);
  gemm<float>(every(s, rows, first), every(s, cols, 0).t(), of_student);
  gemm<float>(every(t, rows, first), every(t, cols, 0).t(), of_teacher);
  std::vector<double> sums(rows * kSums);
  epilogues<float>().row_sums(of_student, of_teacher, false, sums.data(), nullptr);
  double loss = 0;
  for (int64_t i = 0; i < rows; ++i) loss += normalized_row(sums.data() + i * kSums, true).loss;
  return loss >= 2 * kUnrelated * rows;  // false for NaN
}

// The same of all rows, from their coefficients: b_s b_t / a^2 is the squared cosine, and a row's
// b / a is negative where the cosine is positive. Both are free of dout, which multiplies a and b.
bool are_unrelated(const double* a, const double* b_side, const double* b_other, int64_t B) {
  double difference = 0;
  for (int64_t i = 0; i < B; ++i) {
    const double side = b_side[i] / a[i], cosine = std::sqrt(side * (b_other[i] / a[i]));
    difference += 1 - (side > 0 ? -cosine : cosine);
  }
  return difference >= kUnrelated * B;
}

}  // namespace

template <typename T, typename F>
void factored_forward(const Forward<T, F>& call, const Options& options) {
  const Factors<F> factors = {call.gram_student, call.gram_teacher, call.cross};
  const auto &s = call.student, &t = call.teacher;
  if constexpr (!std::is_same_v<T, F>) {
    if (options.normalize == Normalize::kRowL2 && look_unrelated(s, t)) {
      const int64_t D_s = s.cols, D_t = t.cols;
      const Scratch<T> memory(D_s * D_s + D_t * D_t + D_t * D_s);
      const auto in_memory = [&](int64_t offset, int64_t rows, int64_t cols) {
        return Matrix<T>::contiguous(memory.data() + offset, rows, cols);
      };
      const Factors<T> narrow = {in_memory(0, D_s, D_s), in_memory(D_s * D_s, D_t, D_t),
                                 in_memory(D_s * D_s + D_t * D_t, D_t, D_s)};
      const double loss = forward_in<T, T>(s, t, narrow, call.coef, options.normalize);
      if (loss >= 2 * kUnrelated * s.rows) {  // of all rows, not only of those that were looked at
        copy<T, F>(narrow.student, factors.student);
        copy<T, F>(narrow.teacher, factors.teacher);
        copy<T, F>(narrow.cross, factors.cross);
        *call.loss = static_cast<T>(loss);
        return;
      }
    }
  }
  *call.loss = static_cast<T>(forward_in<T, F>(s, t, factors, call.coef, options.normalize));
}

template <typename T, typename F>
void factored_backward(const Backward<T, F>& call, const Options& options) {
  if constexpr (!std::is_same_v<T, F>) {
    if (options.normalize == Normalize::kRowL2 &&
        are_unrelated(call.a, call.b, call.b_other, call.side.rows)) {
      return backward_in<T, F, T>(call, options.normalize);
    }
  }
  backward_in<T, F, F>(call, options.normalize);
}

#define KDK_INSTANTIATE(T, F)                                                 \
  template void factored_forward<T, F>(const Forward<T, F>&, const Options&); \
  template void factored_backward<T, F>(const Backward<T, F>&, const Options&);
KDK_INSTANTIATE(float, float)
KDK_INSTANTIATE(float, double)
KDK_INSTANTIATE(double, double)
#undef KDK_INSTANTIATE

}  // namespace kdk::gram_mse
