// SPDX-License-Identifier: Apache-2.0
// On the CPU, rows times their scales are made before the sweeps, and after them gradients are
// taken through the scales. kdkernels/ops/relational_kl.py says what scales are.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "../common/rows_math.h"
#include "../common/rows_simd.h"
#include "../common/stable.h"
#include "relational_kl_arguments.h"
#include "relational_kl_math.h"
#include "relational_kl_simd.h"

namespace kdk::relational_kl {

template <typename T>
T* numbers_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Returns a norm from its square: clamped, and NaN where T does not hold the square.
template <typename T>
double clamped_norm(double squared) {
  return squared <= std::numeric_limits<T>::max() ? clamp_min(std::sqrt(squared), kEps)
                                                  : std::numeric_limits<double>::quiet_NaN();
}

// Rows of one side, contiguous, and the same times their scales.
template <typename T>
struct ScaledRows {
  Tensor rows, scaled;  // [B, D]

  explicit ScaledRows(const Tensor& x)
      : rows(contiguous_in_type<T>(x)), scaled(empty({x.size(0), x.size(1)}, scalar_type_of<T>)) {}

  const T* row(int64_t i) const { return numbers_of<const T>(rows) + i * rows.size(1); }
  T* scaled_row(int64_t i) const { return numbers_of<T>(scaled) + i * scaled.size(1); }

  // Makes scales [B] of 1 / (norm by), without the norm unless `normalize`.
  void find_scales(bool normalize, double by, T* scales) const {
    const int64_t B = rows.size(0), D = rows.size(1);
    const auto& loops = rows::loops<T>();
    parallel_each(B, 3.0 * D, [&](int64_t i) {
      const double norm = normalize ? clamped_norm<T>(loops.dot(row(i), row(i), D)) : 1;
      scales[i] = static_cast<T>(1 / (norm * by));
      loops.scale(row(i), scales[i], scaled_row(i), D);
    });
  }

  void apply_scales(const T* scales) const {
    const int64_t B = rows.size(0), D = rows.size(1);
    parallel_each(B, 1.0 * D,
                  [&](int64_t i) { rows::loops<T>().scale(row(i), scales[i], scaled_row(i), D); });
  }
};

template <typename T>
double factor_of(double temperature, const Optional& factor) {
  return factor ? temperature * *static_cast<const T*>(factor->const_data_ptr()) : temperature;
}

// Makes the scales [K] of keys with any strides: one over their norms.
template <typename T>
void find_key_scales(const Matrix<const T>& keys, T* scales) {
  constexpr int64_t kBlock = 64;
  const int64_t K = keys.rows, D = keys.cols;
  parallel_each(ceil_div(K, kBlock), 1.0 * kBlock * D, [&](int64_t block) {
    const int64_t k0 = block * kBlock, n = std::min(kBlock, K - k0);
    double squared[kBlock] = {};
    if (keys.col_stride == 1) {
      for (int64_t k = 0; k < n; ++k)
        squared[k] = rows::loops<T>().dot(keys.row(k0 + k), keys.row(k0 + k), D);
    } else {
      for (int64_t d = 0; d < D; ++d) {
        const T* column = keys.row(k0) + d * keys.col_stride;
        for (int64_t k = 0; k < n; ++k) {
          const double x = column[k * keys.row_stride];
          squared[k] += x * x;
        }
      }
    }
    for (int64_t k = 0; k < n; ++k)
      scales[k0 + k] = static_cast<T>(1 / clamped_norm<T>(squared[k]));
  });
}

// Turns v, the derivative by a row x times its scale, into that by the row. A norm that is clamped
// is a constant.
template <typename T>
void through_scale(const T* x, T scale, bool normalize, T* v, int64_t D) {
  const auto& loops = rows::loops<T>();
  if (normalize) {
    scale = static_cast<T>(scale * clamped_norm<T>(loops.dot(x, x, D)));
    loops.normalize_backward(x, v, D);
  }
  if (scale != 1) loops.scale(v, scale, v, D);
}

// The gradients by rows, through their scales and those of their own keys.
template <typename T>
class RowGradients {
 public:
  RowGradients(const Arguments& given, const BackwardArguments& with)
      : B_(given.student.size(0)),
        with_(with),
        numbers_tensor_(torch::stable::contiguous(with.numbers)),
        loss_tensor_(torch::stable::contiguous(with.loss)),
        numbers_(numbers_of<const T>(numbers_tensor_)),
        loss_(numbers_of<const T>(loss_tensor_)),
        dout_(numbers_of<const T>(with.dout)),
        normalize_(given.normalize),
        teacher_(given.teacher.has_value()),
        subtract_entropy_(given.subtract_entropy) {
    if (given.own_keys) own_.emplace(*given.own_keys);
  }

  const T* known(int place) const { return numbers_ + place * B_; }
  T dout(int64_t i) const { return dout_[i * with_.dout.stride(0)]; }

  // Turns v [B, D], the derivatives by the bank's logits, which are dout times too small if they
  // are the student's, into the gradient of a side's rows; and makes that of the factor unless
  // null.
  void finish_side(bool student, const Tensor& rows, const Optional& factor, const Tensor& v,
                   T* by_factor) const {
    const int64_t D = v.size(1);
    const auto& loops = rows::loops<T>();
    const T* scales = known(student ? kStudentScale : kTeacherScale);
    const double by = factor_of<T>(1, factor);
    parallel_each(B_, 8.0 * D, [&](int64_t i) {
      T* to = numbers_of<T>(v) + i * D;
      const T* x = numbers_of<const T>(rows) + i * D;
      if (student) loops.scale(to, dout(i), to, D);
      if (own_) {
        const auto [of_student, of_teacher] = by_own_logits(i);
        const double derivative = student ? of_student : of_teacher;
        epilogues<T>().add_scaled(own_->row(i), static_cast<T>(derivative * known(kOwnScale)[i]),
                                  to, D);
      }
      if (by_factor) by_factor[i] = static_cast<T>(-scales[i] * loops.dot(x, to, D) / by);
      through_scale(x, scales[i], normalize_, to, D);
    });
  }

  // Returns the gradient of own keys.
  Tensor of_own_keys(const Tensor& student, const Optional& teacher) const {
    const int64_t D = student.size(1);
    const Tensor result = empty({B_, D}, scalar_type_of<T>);
    parallel_each(B_, 8.0 * D, [&](int64_t i) {
      T* to = numbers_of<T>(result) + i * D;
      const auto [of_student, of_teacher] = by_own_logits(i);
      rows::loops<T>().scale(numbers_of<const T>(student) + i * D,
                             static_cast<T>(of_student * known(kStudentScale)[i]), to, D);
      if (teacher)
        epilogues<T>().add_scaled(numbers_of<const T>(*teacher) + i * D,
                                  static_cast<T>(of_teacher * known(kTeacherScale)[i]), to, D);
      through_scale(own_->row(i), known(kOwnScale)[i], normalize_, to, D);
    });
    return result;
  }

 private:
  // dout times the derivatives of the loss by the logits of the own key.
  std::pair<double, double> by_own_logits(int64_t i) const {
    const double log_q = static_cast<double>(known(kOwnStudent)[i]) - known(kLseStudent)[i];
    if (!teacher_) return {dout(i) * std::expm1(log_q), 0};  // it is the positive key
    const double log_p = static_cast<double>(known(kOwnTeacher)[i]) - known(kLseTeacher)[i];
    const double p = std::exp(log_p), c = cost(log_p, log_q, subtract_entropy_);
    return {dout(i) * (std::exp(log_q) - p), dout(i) * by_teacher_logit(p, c, double(loss_[i]))};
  }

  int64_t B_;
  const BackwardArguments& with_;
  Tensor numbers_tensor_, loss_tensor_;
  const T *numbers_, *loss_, *dout_;
  bool normalize_, teacher_, subtract_entropy_;
  std::optional<ScaledRows<T>> own_;
};

}  // namespace kdk::relational_kl
