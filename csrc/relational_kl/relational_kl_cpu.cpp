// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::relational_kl_{fwd,bwd}. Arguments were checked by the public
// functions.
#include <algorithm>
#include <tuple>

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
            data<int64_t>(exclude),
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
  Optional teacher, teacher_keys, key_scale, teacher_key_scale, positives, exclude, own_student,
      own_teacher;
  int64_t counting;
  bool subtract_entropy;
};

template <typename T>
T* numbers(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(const Arguments& given, const Optional& own_student,
                                               const Optional& own_teacher, bool with_dloss) {
  const int64_t B = given.student.size(0), D = given.student.size(1);
  constexpr ScalarType type = scalar_type_of<T>;
  const Tensor loss = empty({B}, type), lse_student = empty({B}, type),
               lse_teacher = empty({B}, type);
  const Tensor dloss = with_dloss ? empty({B, D}, type) : empty({0}, type);
  const Operands<T> operands(given, own_student, own_teacher);
  const auto gradient = Matrix<T>::contiguous(numbers<T>(dloss), with_dloss ? B : 0, D);
  forward<T>(operands.view(), {numbers<T>(loss), numbers<T>(lse_student), numbers<T>(lse_teacher)},
             with_dloss ? &gradient : nullptr);
  return {loss, dloss, lse_student, lse_teacher};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& dout, const Arguments& given,
                                               const Tensor& loss, const Tensor& dloss,
                                               const Tensor& lse_student, const Tensor& lse_teacher,
                                               bool need_student, bool need_teacher, bool need_keys,
                                               bool need_teacher_keys) {
  constexpr ScalarType type = scalar_type_of<T>;
  const auto result = [](const Tensor& like, bool needed) {
    return needed ? empty({like.size(0), like.size(1)}, type) : empty({0}, type);
  };
  const Tensor dx = need_student ? scaled_rows<T>(dloss, dout) : empty({0}, type);
  const Tensor dy = need_teacher ? result(*given.teacher, true) : empty({0}, type);
  const Tensor dq = result(given.keys, need_keys);
  const Tensor dr = need_teacher_keys ? result(*given.teacher_keys, true) : empty({0}, type);
  const auto* factors = static_cast<const T*>(dout.const_data_ptr());
  if (need_teacher || need_keys || need_teacher_keys) {
    const Operands<T> operands(given, {}, {});
    const Tensor losses = torch::stable::contiguous(loss),
                 of_student = torch::stable::contiguous(lse_student),
                 of_teacher = torch::stable::contiguous(lse_teacher);
    const auto of_keys = [&](const Tensor& x, bool needed) {
      if (!needed) return Matrix<T>{};
      const auto all = matrix<T>(x);
      const int64_t counting = counting_keys(given);
      fill_zero(all.row_block(counting, all.rows - counting));
      return all.row_block(0, counting);
    };
    const auto teacher = need_teacher ? matrix<T>(dy) : Matrix<T>{};
    const auto keys = of_keys(dq, need_keys), teacher_keys = of_keys(dr, need_teacher_keys);
    backward<T>(
        operands.view(),
        {numbers<const T>(losses), numbers<const T>(of_student), numbers<const T>(of_teacher)},
        factors, dout.stride(0),
        {need_teacher ? &teacher : nullptr, need_keys ? &keys : nullptr,
         need_teacher_keys ? &teacher_keys : nullptr});
  }
  return {dx, dy, dq, dr};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relational_kl_fwd(
    Tensor student, Optional teacher, Tensor keys, Optional teacher_keys, Optional key_scale,
    Optional teacher_key_scale, Optional positives, Optional exclude, Optional num_keys,
    bool subtract_entropy, Optional own_student, Optional own_teacher, bool with_dloss) {
  const Arguments given{student,           teacher,   keys,    teacher_keys, key_scale,
                        teacher_key_scale, positives, exclude, num_keys,     subtract_entropy};
  const auto run = student.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(given, own_student, own_teacher, with_dloss);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relational_kl_bwd(
    Tensor dout, Tensor student, Optional teacher, Tensor keys, Optional teacher_keys,
    Optional key_scale, Optional teacher_key_scale, Optional positives, Optional exclude,
    Optional num_keys, bool subtract_entropy, Tensor loss, Tensor dloss, Tensor lse_student,
    Tensor lse_teacher, bool need_student, bool need_teacher, bool need_keys,
    bool need_teacher_keys) {
  const Arguments given{student,           teacher,   keys,    teacher_keys, key_scale,
                        teacher_key_scale, positives, exclude, num_keys,     subtract_entropy};
  const auto run = student.scalar_type() == ScalarType::Double ? bwd<double> : bwd<float>;
  return run(dout, given, loss, dloss, lse_student, lse_teacher, need_student, need_teacher,
             need_keys, need_teacher_keys);
}

}  // namespace
}  // namespace kdk::relational_kl

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "relational_kl_fwd(Tensor student, Tensor? teacher, Tensor keys, Tensor? teacher_keys, "
      "Tensor? key_scale, Tensor? teacher_key_scale, Tensor? positives, Tensor? exclude, "
      "Tensor? num_keys, bool subtract_entropy, Tensor? own_student, Tensor? own_teacher, "
      "bool with_dloss) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "relational_kl_bwd(Tensor dout, Tensor student, Tensor? teacher, Tensor keys, "
      "Tensor? teacher_keys, Tensor? key_scale, Tensor? teacher_key_scale, Tensor? positives, "
      "Tensor? exclude, Tensor? num_keys, bool subtract_entropy, Tensor loss, Tensor dloss, "
      "Tensor lse_student, Tensor lse_teacher, bool need_student, bool need_teacher, "
      "bool need_keys, bool need_teacher_keys) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("relational_kl_fwd", TORCH_BOX(&kdk::relational_kl::relational_kl_fwd));
  m.impl("relational_kl_bwd", TORCH_BOX(&kdk::relational_kl::relational_kl_bwd));
}
