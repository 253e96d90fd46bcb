// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::relational_kl_{fwd,bwd}. Arguments were checked by the public
// functions.
#include <algorithm>
#include <utility>

#include "../common/cut.h"
#include "../common/scaled_rows.h"
#include "relational_kl_arguments.h"
#include "relational_kl_cpu.h"

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
  Operands(const Arguments& given, const Optional& own_student_, const Optional& own_teacher_)
      : student(for_blas<T>(given.student)),
        keys(for_blas<T>(given.keys)),
        teacher(given.teacher ? Optional(for_blas<T>(*given.teacher)) : std::nullopt),
        teacher_keys(given.teacher_keys ? Optional(for_blas<T>(*given.teacher_keys))
                                        : std::nullopt),
        key_scale(contiguous(given.key_scale)),
        teacher_key_scale(contiguous(given.teacher_key_scale)),
        positives(contiguous(given.positives)),
        exclude(contiguous(given.exclude)),
        excludes_by_mask(exclude && exclude->scalar_type() == ScalarType::Bool),
        own_student(contiguous(own_student_)),
        own_teacher(contiguous(own_teacher_)),
        counting(counting_keys(given)),
        subtract_entropy(given.subtract_entropy) {}

  Problem<T> view() const {
    const Side<T> of_student{matrix<const T>(student), matrix<const T>(keys).row_block(0, counting),
                             data<T>(key_scale)};
    Side<T> of_teacher{};
    if (teacher) {
      of_teacher = {matrix<const T>(*teacher), of_student.keys, of_student.scale};
      if (teacher_keys) {
        of_teacher.keys = matrix<const T>(*teacher_keys).row_block(0, counting);
        of_teacher.scale = data<T>(teacher_key_scale);
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
            data<T>(own_student),
            data<T>(own_teacher),
            subtract_entropy};
  }

 private:
  template <typename Element>
  static const Element* data(const Optional& x) {
    return x ? static_cast<const Element*>(x->const_data_ptr()) : nullptr;
  }

  Tensor student, keys;
  Optional teacher, teacher_keys, key_scale, teacher_key_scale, positives, exclude;
  bool excludes_by_mask;
  Optional own_student, own_teacher;
  int64_t counting;
  bool subtract_entropy;
};

template <typename T>
T* numbers(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
Results fwd(const Arguments& given, const Optional& own_student, const Optional& own_teacher,
            bool need_student) {
  const int64_t B = given.student.size(0), D = given.student.size(1);
  constexpr ScalarType type = scalar_type_of<T>;
  const Tensor loss = empty({B}, type), lse_student = empty({B}, type),
               lse_teacher = empty({B}, type);
  const Tensor dloss = need_student ? empty({B, D}, type) : empty({0}, type);
  const Operands<T> operands(given, own_student, own_teacher);
  const auto gradient = Matrix<T>::contiguous(numbers<T>(dloss), need_student ? B : 0, D);
  forward<T>(operands.view(), {numbers<T>(loss), numbers<T>(lse_student), numbers<T>(lse_teacher)},
             need_student ? &gradient : nullptr);
  return {loss, dloss, lse_student, lse_teacher};
}

template <typename T>
Results bwd(const Arguments& given, const BackwardArguments& with) {
  constexpr ScalarType type = scalar_type_of<T>;
  const auto result = [](const Tensor& like, bool needed) {
    return needed ? empty({like.size(0), like.size(1)}, type) : empty({0}, type);
  };
  const Tensor dx = with.need_student ? scaled_rows<T>(with.dloss, with.dout) : empty({0}, type);
  const Tensor dy = with.need_teacher ? result(*given.teacher, true) : empty({0}, type);
  const Tensor dq = result(given.keys, with.need_keys);
  const Tensor dr = with.need_teacher_keys ? result(*given.teacher_keys, true) : empty({0}, type);
  const auto* factors = static_cast<const T*>(with.dout.const_data_ptr());
  if (with.need_teacher || with.need_keys || with.need_teacher_keys) {
    const Operands<T> operands(given, {}, {});
    const Tensor losses = torch::stable::contiguous(with.loss),
                 of_student = torch::stable::contiguous(with.lse_student),
                 of_teacher = torch::stable::contiguous(with.lse_teacher);
    const auto of_keys = [&](const Tensor& x, bool needed) {
      if (!needed) return Matrix<T>{};
      const auto all = matrix<T>(x);
      const int64_t counting = counting_keys(given);
      fill_zero(all.row_block(counting, all.rows - counting));
      return all.row_block(0, counting);
    };
    const auto teacher = with.need_teacher ? matrix<T>(dy) : Matrix<T>{};
    const auto keys = of_keys(dq, with.need_keys),
               teacher_keys = of_keys(dr, with.need_teacher_keys);
    backward<T>(
        operands.view(),
        {numbers<const T>(losses), numbers<const T>(of_student), numbers<const T>(of_teacher)},
        factors, with.dout.stride(0),
        {with.need_teacher ? &teacher : nullptr, with.need_keys ? &keys : nullptr,
         with.need_teacher_keys ? &teacher_keys : nullptr});
  }
  return {dx, dy, dq, dr};
}

bool in_fp64(const Arguments& given) { return given.student.scalar_type() == ScalarType::Double; }

// The operators, for the list of types of their shared arguments.
template <typename Shared>
struct Operators;

template <typename... Ts>
struct Operators<Types<Ts...>> {
  static Results fwd(Ts... shared, Optional own_student, Optional own_teacher, bool need_student) {
    const Arguments given{std::move(shared)...};
    const auto run = in_fp64(given) ? relational_kl::fwd<double> : relational_kl::fwd<float>;
    return run(given, own_student, own_teacher, need_student);
  }

  static Results bwd(Tensor dout, Ts... shared, Tensor loss, Tensor dloss, Tensor lse_student,
                     Tensor lse_teacher, bool need_student, bool need_teacher, bool need_keys,
                     bool need_teacher_keys) {
    const Arguments given{std::move(shared)...};
    const auto run = in_fp64(given) ? relational_kl::bwd<double> : relational_kl::bwd<float>;
    return run(given, {dout, loss, dloss, lse_student, lse_teacher, need_student, need_teacher,
                       need_keys, need_teacher_keys});
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
