// SPDX-License-Identifier: Apache-2.0
// CPU operator kdkernels_C::correlation_fwd. Arguments were checked by the public function. A first
// pass over the rows adds up the moments of rows and columns, a second one makes the gradient; both
// compute the probabilities and never store them.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/cut.h"
#include "../common/parallel.h"
#include "../common/stable.h"
#include "correlation_simd.h"

namespace kdk::correlation {
namespace {

constexpr int64_t kPieces = 16;             // of the rows, each with moments of its own
constexpr int64_t kElements = 1 << 15;      // probabilities of a side that a block of rows holds
constexpr double kOps = 40;                 // per element and pass, roughly
constexpr int64_t kMergedColumns = 1 << 9;  // a task

struct Options {
  double temperature, row_weight, column_weight;
  bool centered;
  double eps;
};

// `count` sets of moments of C columns.
class ColumnMoments {
 public:
  ColumnMoments(int64_t count, int64_t C) : C_(C), values_(count * 5 * C) {}
  Columns at(int64_t index, int64_t first = 0) {
    double* p = values_.data() + index * 5 * C_ + first;
    return {p, p + C_, p + 2 * C_, p + 3 * C_, p + 4 * C_};
  }

 private:
  int64_t C_;
  std::vector<double> values_;
};

template <typename T>
class Call {
 public:
  Call(const Tensor& student, const Tensor& teacher, const Options& options)
      : s_(torch::stable::contiguous(in_type<T>(student))),
        t_(torch::stable::contiguous(in_type<T>(teacher))),
        options_(options),
        B_(s_.size(0)),
        C_(s_.size(1)),
        temperature_(static_cast<T>(options.temperature)),
        centre_(options.centered ? static_cast<T>(1.0 / static_cast<double>(C_)) : T(0)),
        rows_(B_),
        row_losses_(B_),
        factors_(4 * C_) {}

  // The loss, and the factors of the gradient.
  double loss() {
    const int64_t block = std::clamp<int64_t>(kElements / C_, 1, 64), blocks = ceil_div(B_, block),
                  pieces = std::min(kPieces, blocks), steps = ceil_div(blocks, pieces);
    ColumnMoments moments(pieces, C_);
    const int64_t memory = 2 * block * C_;
    const Scratch<T> scratch(thread_slots() * memory);
    const auto first_row = [&](int64_t piece) { return std::min(piece * steps * block, B_); };
    parallel_each(pieces, kOps * steps * block * C_, [&](int64_t piece) {
      T* a = scratch.data() + thread_index() * memory;
      T* b = a + block * C_;
      const int64_t first = first_row(piece), last = first_row(piece + 1);
      for (int64_t i0 = first; i0 < last; i0 += block) {
        const int64_t n = std::min(block, last - i0);
        for (int64_t i = 0; i < n; ++i) add_row(i0 + i, a + i * C_, b + i * C_);
        loops_.add_rows(Matrix<const T>::contiguous(a, n, C_),
                        Matrix<const T>::contiguous(b, n, C_), i0 - first, options_.centered,
                        moments.at(piece));
      }
    });
    std::vector<double> column_losses(ceil_div(C_, kMergedColumns));
    parallel_each(column_losses.size(), 20.0 * pieces * kMergedColumns, [&](int64_t task) {
      const int64_t c0 = task * kMergedColumns, n = std::min(kMergedColumns, C_ - c0);
      const Columns all = moments.at(0, c0);
      for (int64_t piece = 1; piece < pieces; ++piece) {
        const int64_t before = first_row(piece), count = first_row(piece + 1) - before;
        if (count > 0) loops_.merge(moments.at(piece, c0), count, before, n, all);
      }
      for (int64_t c = 0; c < n; ++c) column_losses[task] += finish_column(all, c, c0 + c);
    });
    double by_rows = 0, by_columns = 0;
    for (const double value : row_losses_) by_rows += value;
    for (const double value : column_losses) by_columns += value;
    const double squared = options_.temperature * options_.temperature;
    return squared * (options_.row_weight * by_rows / static_cast<double>(B_) +
                      options_.column_weight * by_columns / static_cast<double>(C_));
  }

  void gradient(T* dz) const {
    const Scratch<T> scratch(thread_slots() * C_);
    const T* f = factors_.data();
    const ColumnFactors<T> columns = {f, f + C_, f + 2 * C_, f + 3 * C_};
    parallel_each(B_, kOps * C_, [&](int64_t i) {
      loops_.gradient(logits(s_, i), logits(t_, i), C_, temperature_, rows_[i], columns,
                      scratch.data() + thread_index() * C_, dz + i * C_);
    });
  }

 private:
  const T* logits(const Tensor& x, int64_t i) const {
    return static_cast<const T*>(x.const_data_ptr()) + i * C_;
  }

  void add_row(int64_t i, T* a, T* b) {
    RowFactors<T>& row = rows_[i];
    row.a = loops_.softmax(logits(s_, i), C_, temperature_, a);
    row.b = loops_.softmax(logits(t_, i), C_, temperature_, b);
    row.centre = centre_;
    const Coefficients c = coefficients(loops_.moments(a, b, C_, centre_), options_.eps);
    // temperature^2 of the loss, 1 / temperature of the softmax
    const double scale = options_.temperature * options_.row_weight / static_cast<double>(B_);
    row.side = static_cast<T>(scale * c.side);
    row.other = static_cast<T>(scale * c.other);
    row_losses_[i] = 1 - c.rho;
  }

  double finish_column(const Columns& columns, int64_t from, int64_t to) {
    const Coefficients c =
        coefficients({columns.aa[from], columns.bb[from], columns.ab[from]}, options_.eps);
    const double scale = options_.temperature * options_.column_weight / static_cast<double>(C_);
    factors_[to] = static_cast<T>(columns.mean_a[from]);
    factors_[C_ + to] = static_cast<T>(columns.mean_b[from]);
    factors_[2 * C_ + to] = static_cast<T>(scale * c.side);
    factors_[3 * C_ + to] = static_cast<T>(scale * c.other);
    return 1 - c.rho;
  }

  Tensor s_, t_;  // contiguous, in T
  Options options_;
  int64_t B_, C_;
  T temperature_, centre_;
  std::vector<RowFactors<T>> rows_;
  std::vector<double> row_losses_;
  std::vector<T> factors_;  // of columns, see ColumnFactors
  const Loops<T>& loops_ = loops<T>();
};

template <typename T>
std::tuple<Tensor, Tensor> fwd(const Tensor& student, const Tensor& teacher, const Options& options,
                               bool need_student) {
  const int64_t B = student.size(0), C = student.size(1);
  const Tensor value = empty({}, scalar_type_of<T>);
  const Tensor dstudent =
      need_student ? empty({B, C}, scalar_type_of<T>) : empty({0}, scalar_type_of<T>);
  T* loss = static_cast<T*>(value.mutable_data_ptr());
  *loss = 0;
  if (B > 0 && C > 0) {
    Call<T> call(student, teacher, options);
    *loss = static_cast<T>(call.loss());
    if (need_student) call.gradient(static_cast<T*>(dstudent.mutable_data_ptr()));
  }
  return {value, dstudent};
}

std::tuple<Tensor, Tensor> correlation_fwd(Tensor student, Tensor teacher, double temperature,
                                           double row_weight, double column_weight, bool centered,
                                           double eps, bool need_student) {
  const auto run = student.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(student, teacher, {temperature, row_weight, column_weight, centered, eps},
             need_student);
}

}  // namespace
}  // namespace kdk::correlation

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "correlation_fwd(Tensor student, Tensor teacher, float temperature, float row_weight, float "
      "column_weight, bool centered, float eps, bool need_student) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("correlation_fwd", TORCH_BOX(&kdk::correlation::correlation_fwd));
}
