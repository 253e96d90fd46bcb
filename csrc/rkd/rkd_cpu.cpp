// SPDX-License-Identifier: Apache-2.0
// CPU operator kdkernels_C::rkd_fwd. Arguments were checked by the public function.
#include <string>
#include <tuple>

#include "rkd_cpu.h"

namespace kdk::rkd {
namespace {

template <typename T>
std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& student, const Tensor& teacher, bool angles,
                                       bool need_student, bool need_teacher) {
  const auto features = [angles](const Tensor& x) {
    return torch::stable::contiguous(angles ? in_type<double>(x) : in_type<T>(x));
  };
  const Tensor s = features(student), t = features(teacher);
  const auto run = angles ? angle<T> : distance<T>;
  const Result result = run(s, t, need_student);
  const Tensor loss = empty({}, scalar_type_of<T>);
  *static_cast<T*>(loss.mutable_data_ptr()) = static_cast<T>(result.loss);
  return {loss, in_type<T>(result.gradient),
          need_teacher ? in_type<T>(run(t, s, true).gradient) : empty({0}, scalar_type_of<T>)};
}

std::tuple<Tensor, Tensor, Tensor> rkd_fwd(Tensor student, Tensor teacher, std::string relation,
                                           bool need_student, bool need_teacher) {
  const auto run = student.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(student, teacher, relation == "angle", need_student, need_teacher);
}

}  // namespace
}  // namespace kdk::rkd

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "rkd_fwd(Tensor student, Tensor teacher, str relation, bool need_student, bool need_teacher) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) { m.impl("rkd_fwd", TORCH_BOX(&kdk::rkd::rkd_fwd)); }
