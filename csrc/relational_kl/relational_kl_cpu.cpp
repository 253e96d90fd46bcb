// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::relational_kl_{fwd,bwd}. Arguments were checked by the public
// functions.
#include <algorithm>
#include <utility>

#include "../common/cut.h"
#include "relational_kl_arguments.h"
#include "relational_kl_cpu.h"
#include "relational_kl_rows.h"

namespace kdk::relational_kl {
namespace {

// How many of the keys count, the first ones.
int64_t counting_keys(const Arguments& given) {
  const int64_t K = given.keys.size(0);
  if (!given.num_keys) return K;
  const auto* num_keys = static_cast<const int64_t*>(given.num_keys->const_data_ptr());
  return std::clamp<int64_t>(*num_keys, 0, K);
}

// Tensors that a problem's views point into.
template <typename T>
struct Operands {
  // Takes a call whose rows are those times their scales.
  Operands(const Arguments& given, const Tensor& student_, const Optional& teacher_,
           const Tensor& numbers, const Tensor& key_scales)
      : student(student_),
        keys(for_blas<T>(given.keys)),
        teacher(teacher_),
        teacher_keys(given.teacher_keys ? Optional(for_blas<T>(*given.teacher_keys))
                                        : std::nullopt),
        positives(contiguous(given.positives)),
        exclude(contiguous(given.exclude)),
        excludes_by_mask(exclude && exclude->scalar_type() == ScalarType::Bool),
        counting(counting_keys(given)),
        subtract_entropy(given.subtract_entropy) {
    if (given.normalize) {
      key_scale = numbers_of<const T>(key_scales);
      teacher_key_scale = key_scale + keys.size(0);
    }
    if (given.own_keys) {
      own_student = numbers_of<const T>(numbers) + kOwnStudent * student.size(0);
      if (teacher) own_teacher = numbers_of<const T>(numbers) + kOwnTeacher * student.size(0);
    }
  }

  // Makes the scales of keys.
  void find_scales(const Tensor& key_scales) const {
    auto* scales = numbers_of<T>(key_scales);
    find_key_scales<T>(matrix<const T>(keys), scales);
    if (teacher_keys) find_key_scales<T>(matrix<const T>(*teacher_keys), scales + keys.size(0));
  }

  Problem<T> view() const {
    const Side<T> of_student{matrix<const T>(student), matrix<const T>(keys).row_block(0, counting),
                             key_scale};
    Side<T> of_teacher{};
    if (teacher) {
      of_teacher = {matrix<const T>(*teacher), of_student.keys, of_student.scale};
      if (teacher_keys) {
        of_teacher.keys = matrix<const T>(*teacher_keys).row_block(0, counting);
        of_teacher.scale = key_scale ? teacher_key_scale : nullptr;
      }
    }
    return {of_student,
            of_teacher,
            teacher.has_value(),
            !teacher_keys,
            data<int64_t>(positives),
            excludes_by_mask ? nullptr : data<int64_t>(exclude),
            excludes_by_mask ? data<bool>(exclude) : nullptr,
            excludes_by_mask ? exclude->size(1) : 0,
            own_student,
            own_teacher,
            subtract_entropy};
  }

 private:
  template <typename Element>
  static const Element* data(const Optional& x) {
    return x ? static_cast<const Element*>(x->const_data_ptr()) : nullptr;
  }

  Tensor student, keys;
  Optional teacher, teacher_keys, positives, exclude;
  bool excludes_by_mask;
  const T *key_scale = nullptr, *teacher_key_scale = nullptr;
  const T *own_student = nullptr, *own_teacher = nullptr;
  int64_t counting;
  bool subtract_entropy;
};

// Makes the numbers of rows that are known before the sweep.
template <typename T>
void find_numbers(const Arguments& given, const ForwardArguments& with,
                  const ScaledRows<T>& student, const std::optional<ScaledRows<T>>& teacher,
                  T* numbers) {
  const int64_t B = given.student.size(0), D = given.student.size(1);
  std::fill_n(numbers, kNumbers * B, T(0));
  const auto at = [&](int place) { return numbers + place * B; };
  student.find_scales(given.normalize, factor_of<T>(with.student_temperature, given.student_factor),
                      at(kStudentScale));
  if (teacher)
    teacher->find_scales(given.normalize,
                         factor_of<T>(with.teacher_temperature, given.teacher_factor),
                         at(kTeacherScale));
  if (!given.own_keys) return;
  const ScaledRows<T> own(*given.own_keys);
  own.find_scales(given.normalize, 1, at(kOwnScale));
  parallel_each(B, 4.0 * D, [&](int64_t i) {
    const auto& loops = rows::loops<T>();
    const auto logit = [&](const ScaledRows<T>& side) {
      return static_cast<T>(loops.dot(side.scaled_row(i), own.scaled_row(i), D));
    };
    at(kOwnStudent)[i] = logit(student);
    if (teacher) at(kOwnTeacher)[i] = logit(*teacher);
  });
}

template <typename T>
Results fwd(const Arguments& given, const ForwardArguments& with) {
  const int64_t B = given.student.size(0), D = given.student.size(1), K = given.keys.size(0);
  constexpr ScalarType type = scalar_type_of<T>;
  const Tensor loss = empty({B}, type), numbers = empty({kNumbers, B}, type);
  const Tensor key_scales = empty({given.normalize ? (given.teacher_keys ? 2 : 1) : 0, K}, type);
  const Tensor dloss = with.need_student ? empty({B, D}, type) : empty({0}, type);
  const ScaledRows<T> student(given.student);
  std::optional<ScaledRows<T>> teacher;
  if (given.teacher) teacher.emplace(*given.teacher);
  auto* known = numbers_of<T>(numbers);
  find_numbers<T>(given, with, student, teacher, known);
  const Operands<T> operands(given, student.scaled,
                             teacher ? Optional(teacher->scaled) : std::nullopt, numbers,
                             key_scales);
  if (given.normalize) operands.find_scales(key_scales);
  const auto gradient = Matrix<T>::contiguous(numbers_of<T>(dloss), with.need_student ? B : 0, D);
  forward<T>(operands.view(),
             {numbers_of<T>(loss), known + kLseStudent * B, known + kLseTeacher * B},
             with.need_student ? &gradient : nullptr);
  return {loss, dloss, numbers, key_scales};
}

// Returns gradients in the dtype of what they belong to, and empty ones in the place of others.
Tensor gradient_like(const Tensor& like, const Optional& gradient) {
  return gradient ? in_dtype(*gradient, like.scalar_type()) : empty({0}, like.scalar_type());
}

template <typename T>
BackwardResults bwd(const Arguments& given, const BackwardArguments& with) {
  constexpr ScalarType type = scalar_type_of<T>;
  const int64_t B = given.student.size(0);
  const RowGradients<T> rows(given, with);
  const bool of_teacher = with.need_teacher || with.need_teacher_factor,
             of_student = with.need_student || with.need_student_factor;
  Optional dx, dy, dq, dr, own;
  const auto result = [](const Tensor& like) { return empty({like.size(0), like.size(1)}, type); };
  const auto by_factor = [&](bool needed) { return empty({needed ? B : 0}, type); };
  const Tensor by_student = by_factor(with.need_student_factor),
               by_teacher = by_factor(with.need_teacher_factor);
  const bool sweeps = of_teacher || with.need_keys || with.need_teacher_keys;
  const ScaledRows<T> student(given.student);
  std::optional<ScaledRows<T>> teacher;
  if (given.teacher) teacher.emplace(*given.teacher);
  if (of_student) {
    const Tensor from = torch::stable::contiguous(with.dloss);
    dx = result(given.student);
    std::copy_n(numbers_of<const T>(from), from.numel(), numbers_of<T>(*dx));
    rows.finish_side(true, student.rows, given.student_factor, *dx,
                     with.need_student_factor ? numbers_of<T>(by_student) : nullptr);
  }
  if (with.need_own_keys)
    own = rows.of_own_keys(student.rows, teacher ? Optional(teacher->rows) : std::nullopt);
  if (sweeps) {
    student.apply_scales(rows.known(kStudentScale));
    if (teacher) teacher->apply_scales(rows.known(kTeacherScale));
    const Tensor scales = torch::stable::contiguous(with.key_scales),
                 losses = torch::stable::contiguous(with.loss);
    const Operands<T> operands(given, student.scaled,
                               teacher ? Optional(teacher->scaled) : std::nullopt, with.numbers,
                               scales);
    const int64_t counting = counting_keys(given);
    const auto of_keys = [&](bool needed, const Optional& like, Optional& to) {
      if (!needed) return Matrix<T>{};
      to = result(*like);
      const auto all = matrix<T>(*to);
      fill_zero(all.row_block(counting, all.rows - counting));
      return all.row_block(0, counting);
    };
    const auto keys = of_keys(with.need_keys, given.keys, dq),
               teacher_keys = of_keys(with.need_teacher_keys, given.teacher_keys, dr);
    if (of_teacher) dy = result(*given.teacher);
    const auto by_rows = of_teacher ? matrix<T>(*dy) : Matrix<T>{};
    backward<T>(operands.view(),
                {numbers_of<const T>(losses), rows.known(kLseStudent), rows.known(kLseTeacher)},
                numbers_of<const T>(with.dout), with.dout.stride(0),
                {of_teacher ? &by_rows : nullptr, with.need_keys ? &keys : nullptr,
                 with.need_teacher_keys ? &teacher_keys : nullptr});
    if (of_teacher)
      rows.finish_side(false, teacher->rows, given.teacher_factor, *dy,
                       with.need_teacher_factor ? numbers_of<T>(by_teacher) : nullptr);
    const auto finish_keys = [&](const Matrix<T>& v, const Optional& bank, int64_t place) {
      const Tensor x = contiguous_in_type<T>(*bank);
      const auto from = matrix<const T>(x);
      const T* scale = numbers_of<const T>(scales) + place * from.rows;
      parallel_each(v.rows, 8.0 * v.cols, [&](int64_t k) {
        through_scale(from.row(k), scale[k], true, v.row(k), v.cols);
      });
    };
    if (given.normalize && dq) finish_keys(keys, given.keys, 0);
    if (given.normalize && dr) finish_keys(teacher_keys, given.teacher_keys, 1);
  }
  if (!with.need_student) dx.reset();
  if (!with.need_teacher) dy.reset();
  return {gradient_like(given.student, dx),
          gradient_like(given.student, dy),
          gradient_like(given.student, dq),
          gradient_like(given.student, dr),
          gradient_like(given.student, own),
          by_student,
          by_teacher};
}

bool in_fp64(const Arguments& given) { return given.student.scalar_type() == ScalarType::Double; }

// The operators, for the list of types of their shared arguments.
template <typename Shared>
struct Operators;

template <typename... Ts>
struct Operators<Types<Ts...>> {
  static Results fwd(Ts... shared, double student_temperature, double teacher_temperature,
                     bool need_student) {
    const Arguments given{std::move(shared)...};
    const auto run = in_fp64(given) ? relational_kl::fwd<double> : relational_kl::fwd<float>;
    return run(given, {student_temperature, teacher_temperature, need_student});
  }

  static BackwardResults bwd(Tensor dout, Ts... shared, Tensor loss, Tensor dloss, Tensor numbers,
                             Tensor key_scales, bool need_student, bool need_teacher,
                             bool need_keys, bool need_teacher_keys, bool need_own_keys,
                             bool need_student_factor, bool need_teacher_factor) {
    const Arguments given{std::move(shared)...};
    const auto run = in_fp64(given) ? relational_kl::bwd<double> : relational_kl::bwd<float>;
    return run(given,
               {dout, loss, dloss, numbers, key_scales, need_student, need_teacher, need_keys,
                need_teacher_keys, need_own_keys, need_student_factor, need_teacher_factor});
  }
};

using Native = Operators<ArgumentTypes>;

}  // namespace
}  // namespace kdk::relational_kl

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(kdk::relational_kl::fwd_schema().c_str());
  m.def(kdk::relational_kl::bwd_schema().c_str());
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("relational_kl_fwd", TORCH_BOX(&kdk::relational_kl::Native::fwd));
  m.impl("relational_kl_bwd", TORCH_BOX(&kdk::relational_kl::Native::bwd));
}
