// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::lsh_bce_{encode,fwd,bwd}. Arguments were checked by the public
// functions.
#include <optional>
#include <tuple>
#include <vector>

#include "../common/integers.h"
#include "../common/scaled_rows.h"
#include "lsh_bce_cpu.h"

namespace kdk::lsh_bce {
namespace {

// Tensors that a projection's view points into.
template <typename T>
struct Operands {
  Tensor features, weight, bias;

  Operands(const Tensor& x, const Tensor& w, const Optional& b)
      : features(for_blas<T>(x)), weight(for_blas<T>(w)) {
    if (b) {
      bias = contiguous_in_type<T>(*b);
    } else {
      bias = empty({w.size(0)}, scalar_type_of<T>);
      std::fill_n(static_cast<T*>(bias.mutable_data_ptr()), w.size(0), T(0));
    }
  }

  Projection<T> view() const {
    return {matrix<const T>(features), matrix<const T>(weight),
            static_cast<const T*>(bias.const_data_ptr())};
  }
};

std::optional<std::vector<int64_t>> selected(const Optional& mask) {
  if (!mask) return std::nullopt;
  std::vector<int64_t> rows;
  const auto* keep = static_cast<const bool*>(mask->const_data_ptr());
  for (int64_t i = 0; i < mask->size(0); ++i) {
    if (keep[i * mask->stride(0)]) rows.push_back(i);
  }
  return rows;
}

template <typename T>
Tensor encode(const Tensor& features, const Tensor& weight, const Optional& bias) {
  const Operands<T> operands(features, weight, bias);
  const Tensor codes =
      kdk::empty({features.size(0), ceil_div(weight.size(0), 8)}, ScalarType::Byte);
  encode<T>(operands.view(), matrix<uint8_t>(codes));
  return codes;
}

template <typename T>
std::tuple<Tensor, Tensor> fwd(const Tensor& student, const Tensor& codes, const Tensor& weight,
                               const Optional& bias, const Optional& sample_mask,
                               bool need_student) {
  const int64_t B = student.size(0), D = student.size(1);
  constexpr ScalarType type = scalar_type_of<T>;
  const Tensor loss = empty({B}, type);
  const Tensor dloss = need_student ? empty({B, D}, type) : empty({0}, type);
  const Operands<T> operands(student, weight, bias);
  const Tensor bits = torch::stable::contiguous(codes);
  const auto rows = selected(sample_mask);
  auto* losses = static_cast<T*>(loss.mutable_data_ptr());
  if (rows) {
    std::fill_n(losses, B, T(0));
    std::fill_n(static_cast<T*>(dloss.mutable_data_ptr()), dloss.numel(), T(0));
  }
  const Matrix<T> gradient =
      Matrix<T>::contiguous(static_cast<T*>(dloss.mutable_data_ptr()), need_student ? B : 0, D);
  forward<T>({operands.view(), matrix<const uint8_t>(bits), rows ? &*rows : nullptr}, losses,
             need_student ? &gradient : nullptr);
  return {loss, dloss};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dout, const Tensor& student,
                                       const Tensor& codes, const Tensor& weight,
                                       const Optional& bias, const Optional& sample_mask,
                                       const Tensor& dloss, bool need_student, bool need_weight,
                                       bool need_bias) {
  constexpr ScalarType type = scalar_type_of<T>;
  const int64_t N = weight.size(0), D = weight.size(1);
  const auto* factors = static_cast<const T*>(dout.const_data_ptr());
  const Tensor ds = need_student ? scaled_rows<T>(dloss, dout) : empty({0}, type);
  const Tensor dw = need_weight ? empty({N, D}, type) : empty({0}, type);
  const Tensor db = empty({need_bias ? N : 0}, type);
  if (need_weight || need_bias) {
    const Operands<T> operands(student, weight, bias);
    const Tensor bits = torch::stable::contiguous(codes);
    const auto rows = selected(sample_mask);
    const Matrix<T> dweight =
        Matrix<T>::contiguous(static_cast<T*>(dw.mutable_data_ptr()), need_weight ? N : 0, D);
    backward<T>({operands.view(), matrix<const uint8_t>(bits), rows ? &*rows : nullptr}, factors,
                dout.stride(0), need_weight ? &dweight : nullptr,
                need_bias ? static_cast<T*>(db.mutable_data_ptr()) : nullptr);
  }
  return {in_dtype(ds, student.scalar_type()), in_dtype(dw, weight.scalar_type()),
          in_dtype(db, weight.scalar_type())};
}

Tensor lsh_bce_encode(Tensor features, Tensor weight, Optional bias) {
  return features.scalar_type() == ScalarType::Double ? encode<double>(features, weight, bias)
                                                      : encode<float>(features, weight, bias);
}

std::tuple<Tensor, Tensor> lsh_bce_fwd(Tensor student, Tensor codes, Tensor weight, Optional bias,
                                       Optional sample_mask, bool need_student) {
  const auto run = student.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(student, codes, weight, bias, sample_mask, need_student);
}

std::tuple<Tensor, Tensor, Tensor> lsh_bce_bwd(Tensor dout, Tensor student, Tensor codes,
                                               Tensor weight, Optional bias, Optional sample_mask,
                                               Tensor dloss, bool need_student, bool need_weight,
                                               bool need_bias) {
  const auto run = student.scalar_type() == ScalarType::Double ? bwd<double> : bwd<float>;
  return run(dout, student, codes, weight, bias, sample_mask, dloss, need_student, need_weight,
             need_bias);
}

}  // namespace
}  // namespace kdk::lsh_bce

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def("lsh_bce_encode(Tensor features, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "lsh_bce_fwd(Tensor student, Tensor codes, Tensor weight, Tensor? bias, Tensor? sample_mask, "
      "bool need_student) -> (Tensor, Tensor)");
  m.def(
      "lsh_bce_bwd(Tensor dout, Tensor student, Tensor codes, Tensor weight, Tensor? bias, Tensor? "
      "sample_mask, Tensor dloss, bool need_student, bool need_weight, bool need_bias) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("lsh_bce_encode", TORCH_BOX(&kdk::lsh_bce::lsh_bce_encode));
  m.impl("lsh_bce_fwd", TORCH_BOX(&kdk::lsh_bce::lsh_bce_fwd));
  m.impl("lsh_bce_bwd", TORCH_BOX(&kdk::lsh_bce::lsh_bce_bwd));
}
