// SPDX-License-Identifier: Apache-2.0
// CUDA operators kdkernels_cuda::lsh_bce_{encode,fwd,bwd}. Arguments were checked by the public
// functions.
#include "lsh_bce_cuda.h"

#include <tuple>

#include "../common/cuda/glue.h"

namespace kdk::lsh_bce {
namespace {

using namespace kdk::cuda;

// Tensors that a projection's view points into, in the dtype that they are multiplied in.
struct Operands {
  Tensor features, weight;
  Optional bias;
  Math math;

  Operands(const Tensor& x, const Tensor& w, const Optional& b, Math math_)
      : features(with_contiguous_rows(in_dtype(x, dtype_of(math_)))),
        weight(with_contiguous_rows(in_dtype(w, dtype_of(math_)))),
        math(math_) {
    if (b) bias = in_dtype(*b, dtype_of(math));
  }

  CudaProjection view(const Optional& sample_mask = {}) const {
    return {source_of(features, sample_mask), source_of(weight),
            bias ? bias->mutable_data_ptr() : nullptr, bias ? bias->stride(0) : 0};
  }
};

Tensor lsh_bce_encode(Tensor features, Tensor weight, Optional bias, bool ieee) {
  const Device device(features);
  const int64_t B = features.size(0), N = weight.size(0);
  const Tensor codes = device.empty({B, ceil_div(N, 8)}, ScalarType::Byte);
  if (codes.numel() == 0) return codes;
  const Operands operands(features, weight, bias, math_of(features, ieee));
  launch_lsh_bce_encode({operands.view(), data_of<uint8_t>(codes)}, operands.math, device.stream());
  return codes;
}

ProjectParams project_params(const Operands& operands, const Tensor& codes,
                             const Optional& sample_mask) {
  ProjectParams params{};
  params.projection = operands.view(sample_mask);
  params.codes = data_of<const uint8_t>(codes);
  params.codes_stride_b = codes.stride(0);
  params.codes_stride_n = codes.stride(1);
  return params;
}

std::tuple<Tensor, Tensor> lsh_bce_fwd(Tensor student, Tensor codes, Tensor weight, Optional bias,
                                       Optional sample_mask, bool need_student, bool ieee) {
  const Device device(student);
  const int64_t B = student.size(0), D = student.size(1), N = weight.size(0);
  if (B == 0 || N == 0)
    return {device.zeros({B}, ScalarType::Float), need_student
                                                      ? device.zeros({B, D}, ScalarType::Float)
                                                      : device.empty({0}, ScalarType::Float)};
  const Tensor loss = device.empty({B}, ScalarType::Float);
  const Tensor dloss =
      need_student ? device.empty({B, D}, ScalarType::Float) : device.empty({0}, ScalarType::Float);
  const Math math = math_of(student, ieee);
  const Operands operands(student, weight, bias, math);
  const auto all = project_params(operands, codes, sample_mask);
  const int64_t step =
      need_student ? rows_in_l2(B, N * static_cast<int64_t>(element_bytes(math))) : B;
  const int64_t across = ceil_div(N, kTile);
  const Tensor parts = device.empty({across, step}, ScalarType::Float);
  const Tensor dz = device.empty({need_student ? step : 0, N}, dtype_of(math));
  for (int64_t first = 0; first < B; first += step) {
    const int64_t rows = std::min(step, B - first);
    auto params = all;
    params.projection.features = rows_of(all.projection.features, first, rows, math);
    params.codes += first * params.codes_stride_b;
    params.loss = data_of<float>(parts);
    params.loss_stride = rows;
    const PartSums sums{params.loss, data_of<float>(loss) + first, across, rows, Dtype::kFloat};
    if (!need_student) {
      launch_lsh_bce_project(params, math, device.stream());
      launch_part_sums(sums, device.stream());
      continue;
    }
    Product product(device, 1, rows, D, N, math);
    product.params.a = source_of(dz);
    product.params.a.rows = rows;
    product.params.b = all.projection.weight;
    product.params.out = data_of<float>(dloss) + first * D;
    product.params.out_dtype = Dtype::kFloat;
    product.params.sums = sums;
    params.dz = dz.mutable_data_ptr();
    params.semaphores = product.params.semaphores;
    params.semaphore_count = product.semaphore_count();
    launch_lsh_bce_project(params, math, device.stream());
    product.launch(Along::kContraction, device);
  }
  return {loss, dloss};
}

// Makes both gradients in chunks of directions: each row of dweight needs one chunk only.
void weight_gradients(const Device& device, const Tensor& dout, const Operands& operands,
                      const Tensor& codes, const Optional& sample_mask,
                      const Tensor& dweight,  // [N, D], or empty
                      const Tensor& dbias) {  // [N], or empty
  const Math math = operands.math;
  const auto all = project_params(operands, codes, sample_mask);
  const int64_t B = operands.features.size(0), N = operands.weight.size(0),
                D = operands.weight.size(1);
  const int64_t size = static_cast<int64_t>(element_bytes(math));
  const int64_t step = rows_in_l2(N, B * size), down = ceil_div(B, kTile);
  const bool need_weight = dweight.numel() > 0, need_bias = dbias.numel() > 0;
  const Tensor dz = device.empty({need_weight ? B : 0, step}, dtype_of(math));
  const Tensor columns = device.empty({need_bias ? down : 0, step}, ScalarType::Float);
  for (int64_t first = 0; first < N; first += step) {
    const int64_t count = std::min(step, N - first);
    auto params = all;
    params.projection.weight = rows_of(all.projection.weight, first, count, math);
    if (params.projection.bias != nullptr)
      params.projection.bias = static_cast<const char*>(params.projection.bias) +
                               first * params.projection.bias_stride * size;
    params.codes += first / 8 * params.codes_stride_n;
    params.factor = data_of<const float>(dout);
    params.factor_stride = dout.stride(0);
    PartSums sums{};
    if (need_bias) {
      params.dbias = data_of<float>(columns);
      sums = {params.dbias, data_of<char>(dbias) + first * dbias.element_size(), down, count,
              stored_as(dbias.scalar_type())};
    }
    if (!need_weight) {
      launch_lsh_bce_project(params, math, device.stream());
      launch_part_sums(sums, device.stream());
      continue;
    }
    Product product(device, 1, count, D, B, math);
    product.params.a = source_of(dz);
    product.params.a.cols = product.params.a.stride = count;
    product.params.a.aligned = product.params.a.aligned && count * size % kChunkBytes == 0;
    product.params.b = all.projection.features;
    product.params.out = data_of<char>(dweight) + first * D * dweight.element_size();
    product.params.out_dtype = stored_as(dweight.scalar_type());
    product.params.sums = sums;
    params.dz = dz.mutable_data_ptr();
    params.semaphores = product.params.semaphores;
    params.semaphore_count = product.semaphore_count();
    launch_lsh_bce_project(params, math, device.stream());
    product.launch(Along::kOutput, device);
  }
}

std::tuple<Tensor, Tensor, Tensor> lsh_bce_bwd(Tensor dout, Tensor student, Tensor codes,
                                               Tensor weight, Optional bias, Optional sample_mask,
                                               Tensor dloss, bool need_student, bool need_weight,
                                               bool need_bias, bool ieee) {
  const Device device(student);
  const int64_t B = student.size(0), N = weight.size(0), D = weight.size(1);
  const ScalarType dtype = student.scalar_type();
  const Tensor ds =
      need_student ? scaled_rows(device, dloss, dout, dtype) : device.empty({0}, dtype);
  // fp16 could not hold what dout makes of a derivative
  const Math math = dtype == ScalarType::Half ? Math::kTf32x3 : math_of(student, ieee);
  const auto result = [&](std::initializer_list<int64_t> sizes, bool need) {
    if (!need) return device.empty({0}, dtype);
    return B == 0 ? device.zeros(sizes, dtype) : device.empty(sizes, dtype);
  };
  const Tensor dw = result({N, D}, need_weight);
  const Tensor db = result({N}, need_bias);
  if (B > 0 && dw.numel() + db.numel() > 0)
    weight_gradients(device, dout, Operands(student, weight, bias, math), codes, sample_mask, dw,
                     db);
  return {ds, dw, db};
}

}  // namespace
}  // namespace kdk::lsh_bce

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_cuda, m) {
  m.def("lsh_bce_encode(Tensor features, Tensor weight, Tensor? bias, bool ieee) -> Tensor");
  m.def(
      "lsh_bce_fwd(Tensor student, Tensor codes, Tensor weight, Tensor? bias, Tensor? sample_mask, "
      "bool need_student, bool ieee) -> (Tensor, Tensor)");
  m.def(
      "lsh_bce_bwd(Tensor dout, Tensor student, Tensor codes, Tensor weight, Tensor? bias, Tensor? "
      "sample_mask, Tensor dloss, bool need_student, bool need_weight, bool need_bias, bool ieee) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda, KDK_CUDA_DISPATCH_KEY, m) {
  m.impl("lsh_bce_encode", TORCH_BOX(&kdk::lsh_bce::lsh_bce_encode));
  m.impl("lsh_bce_fwd", TORCH_BOX(&kdk::lsh_bce::lsh_bce_fwd));
  m.impl("lsh_bce_bwd", TORCH_BOX(&kdk::lsh_bce::lsh_bce_bwd));
}
