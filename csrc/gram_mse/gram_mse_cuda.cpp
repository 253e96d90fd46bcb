// SPDX-License-Identifier: Apache-2.0
// CUDA operators kdkernels_cuda::gram_mse_{fwd,bwd}: "resident" and "streamed". Arguments were
// checked by the public function.
#include "gram_mse_cuda.h"

#include <string>
#include <tuple>

#include "../common/cuda/glue.h"
#include "../common/cuda/normalise.h"
#include "gram_mse_names.h"

namespace kdk::gram_mse {
namespace {

using namespace kdk::cuda;

// Both sides in the dtype that they are multiplied in, and the options.
struct Operands {
  Tensor x[2];  // [G, B, D]
  Math math;
  int64_t G, B;
  std::optional<Tensor> scale;  // [2, G, B]
  Problem problem;

  Operands(const Device& device, const Tensor& student, const Tensor& teacher, Math math_,
           Normalize normalize, bool taylor, double gamma, int64_t order)
      : x{with_contiguous_rows(in_dtype(student, dtype_of(math_))),
          with_contiguous_rows(in_dtype(teacher, dtype_of(math_)))},
        math(math_),
        G(student.size(0)),
        B(student.size(1)),
        problem{{source_of(x[0]), source_of(x[1])},
                G,
                B,
                nullptr,
                taylor                         ? Form::kTaylor
                : is_row_normalized(normalize) ? Form::kRow
                                               : Form::kPlain,
                normalize == Normalize::kRowL1,
                Taylor<float>(gamma, static_cast<int>(order))} {
    if (normalize == Normalize::kFeature) {
      scale = device.empty({2, G, B}, ScalarType::Float);
      problem.scale = data_of<const float>(*scale);
    }
  }

  NormsParams norms() const {
    return {{problem.x[0], problem.x[1]}, G, B, scale ? data_of<float>(*scale) : nullptr};
  }
};

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward resident_forward(const Device& device, const Operands& operands) {
  const int64_t G = operands.G, B = operands.B, n = ceil_div(B, kTile);
  const Tensor loss = device.empty({G}, ScalarType::Float);
  const Tensor coef = device.empty({G, kCoefs, B}, ScalarType::Double);
  const Tensor gram[2] = {device.empty({G, B, B}, ScalarType::Float),
                          device.empty({G, B, B}, ScalarType::Float)};
  const Tensor semaphores = device.empty({G}, ScalarType::Int);
  const Tensor row_losses = device.empty({G, B}, ScalarType::Double);
  ResidentParams product{};
  product.problem = operands.problem;
  product.norms = operands.norms();
  product.semaphores = data_of<unsigned>(semaphores);
  const int64_t width = std::max(operands.x[0].size(2), operands.x[1].size(2));
  const int64_t tiles = G * n * (n + 1);
  product.splits = split_contraction(tiles, width, operands.math).count;
  FinishParams finish{};
  std::optional<Tensor> parts[2];
  for (int side = 0; side < 2; ++side) {
    const int64_t step = kStepBytes / static_cast<int64_t>(element_bytes(operands.math));
    product.split_length[side] = round_up(ceil_div(operands.x[side].size(2), product.splits), step);
    if (product.splits > 1)
      parts[side] = device.empty({product.splits, G, B, B}, ScalarType::Float);
    product.parts[side] = data_of<float>(parts[side] ? *parts[side] : gram[side]);
    finish.parts[side] = product.parts[side];
    finish.gram[side] = data_of<float>(gram[side]);
  }
  finish.problem = operands.problem;
  finish.splits = product.splits;
  finish.coef = data_of<double>(coef);
  finish.row_losses = data_of<double>(row_losses);
  finish.loss = data_of<float>(loss);
  finish.semaphores = product.semaphores;
  launch_gram_mse_resident(product, operands.math, device.stream());
  launch_gram_mse_finish(finish, device.stream());
  return {loss, coef, gram[0], gram[1], device.empty({G, 0, 0}, ScalarType::Float)};
}

Forward streamed_forward(const Device& device, const Operands& operands) {
  const int64_t G = operands.G, B = operands.B, n = ceil_div(B, kTile);
  const Tensor loss = device.empty({G}, ScalarType::Float);
  const Tensor coef = device.empty({G, kCoefs, B}, ScalarType::Double);
  const Tensor row_losses = device.empty({G, B}, ScalarType::Double);
  // enough rows of tiles at a time to fill the device; the sums that a launch leaves are O(B) each
  const int64_t step = std::min(n, ceil_div(2 * processors(), n));
  const Tensor along = device.empty({n, kSums, step * kTile}, ScalarType::Double);
  const Tensor across = device.empty({step, kSums, B}, ScalarType::Double);
  const Tensor totals = device.empty({kSums, B}, ScalarType::Double);
  launch_gram_mse_norms(operands.norms(), operands.math, device.stream());
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t first = 0; first < n; first += step) {
      const PairSumsParams sums{
          operands.problem,       g, first, std::min(step, n - first), data_of<double>(along),
          data_of<double>(across)};
      launch_gram_mse_pair_sums(sums, operands.math, device.stream());
      launch_gram_mse_pair_finish(
          {sums, data_of<double>(totals), data_of<double>(coef) + g * kCoefs * B,
           data_of<double>(row_losses) + g * B},
          device.stream());
    }
  }
  launch_gram_mse_loss({data_of<const double>(row_losses), data_of<float>(loss), B}, G,
                       device.stream());
  return {loss, coef, device.empty({G, 0, 0}, ScalarType::Float),
          device.empty({G, 0, 0}, ScalarType::Float), device.empty({G, 0, 0}, ScalarType::Float)};
}

Forward gram_mse_fwd(Tensor student, Tensor teacher, std::string normalize, std::string kernel,
                     double gamma, int64_t order, std::string algorithm, bool ieee) {
  const Device device(student);
  const int64_t G = student.size(0), B = student.size(1);
  const bool resident = by_name(kAlgorithms, algorithm) == Algorithm::kResident;
  if (student.numel() + teacher.numel() == 0) {
    const int64_t n = resident ? B : 0;
    return {device.zeros({G}, ScalarType::Float), device.zeros({G, kCoefs, B}, ScalarType::Double),
            device.zeros({G, n, n}, ScalarType::Float), device.zeros({G, n, n}, ScalarType::Float),
            device.empty({G, 0, 0}, ScalarType::Float)};
  }
  const Operands operands(device, student, teacher, math_of(student, ieee),
                          by_name(kNormalizations, normalize), by_name(kTaylorKernels, kernel),
                          gamma, order);
  return resident ? resident_forward(device, operands) : streamed_forward(device, operands);
}

// dX = W X from both Grams.
void multiply_resident(const Device& device, const Operands& operands, WeightsParams weights,
                       const Tensor* grams, const Tensor& out) {
  const int64_t G = operands.G, B = operands.B;
  const Tensor w = device.empty({G, B, B}, dtype_of(operands.math));
  Product product(device, G, B, out.size(2), B, operands.math);
  weights.side_gram = data_of<const float>(grams[weights.side]);
  weights.other_gram = data_of<const float>(grams[1 - weights.side]);
  weights.weights = w.mutable_data_ptr();
  weights.semaphores = product.params.semaphores;
  weights.semaphore_count = product.semaphore_count();
  product.params.a = source_of(w);
  product.params.b = operands.problem.x[weights.side];
  product.params.out = out.mutable_data_ptr();
  product.params.out_dtype = stored_as(out.scalar_type());
  launch_gram_mse_bwd_weights(weights, operands.math, device.stream());
  product.launch(Along::kContraction, device);
}

// dX = W X, W in some rows R at a time, of which only what is on and above the diagonal is made:
//   dX[R] += W[R, from R on] X[from R on],   dX[below R] += W[R, below R]^T X[R]
// The first completes the rows R, so it stores them as they are wanted; until then they are sums.
void multiply_streamed(const Device& device, const Operands& operands, WeightsParams weights,
                       const Tensor& out) {
  const int64_t B = operands.B, D = out.size(2);
  const Math math = operands.math;
  const auto size = static_cast<int64_t>(element_bytes(math));
  const bool in_place = out.scalar_type() == ScalarType::Float;
  const bool whole = rows_in_l2(B, B * size) == B;
  const Tensor memory = device.empty({in_place || whole ? 0 : B, D}, ScalarType::Float);
  for (int64_t g = 0; g < operands.G; ++g) {
    Source x = operands.problem.x[weights.side];
    x.data = static_cast<const char*>(x.data) + g * x.group * size;
    float* const sums = in_place ? data_of<float>(out) + g * B * D : data_of<float>(memory);
    for (int64_t first = 0, rows; first < B; first += rows) {
      const int64_t width = B - first;
      rows = rows_in_l2(width, width * size);
      const int64_t next = first + rows;
      const Tensor w = device.empty({rows, width}, dtype_of(math));
      Product across(device, 1, rows, D, width, math), below(device, 1, B - next, D, rows, math);
      weights.weights = w.mutable_data_ptr();
      weights.semaphores = across.params.semaphores;
      weights.semaphore_count = across.semaphore_count();
      launch_gram_mse_bwd_pair_weights(
          {weights, g, first, rows, below.params.semaphores, below.semaphore_count()}, math,
          device.stream());
      across.params.a = source_of(w);
      across.params.b = rows_of(x, first, width, math);
      across.params.add = first > 0 ? sums + first * D : nullptr;
      across.params.out = data_of<char>(out) + (g * B + first) * D * out.element_size();
      across.params.out_dtype = stored_as(out.scalar_type());
      across.launch(Along::kContraction, device);
      if (next == B) continue;
      below.params.a = across.params.a;
      below.params.a.data = data_of<char>(w) + rows * size;
      below.params.a.cols = B - next;
      below.params.b = rows_of(x, first, rows, math);
      below.params.out = sums + next * D;
      below.params.add = first > 0 ? sums + next * D : nullptr;
      below.params.out_dtype = Dtype::kFloat;
      below.launch(Along::kOutput, device);
    }
  }
}

// Returns the gradient of features x, through their normalisation if they are normalised.
Tensor gradient(const Device& device, const Operands& operands, int side, const Tensor& x,
                const Tensor& dout, const Tensor& coef, const Tensor* grams) {
  const int64_t G = operands.G, B = operands.B, D = x.size(2);
  const bool unit = operands.problem.scale != nullptr;
  const Tensor dx = device.empty({G, B, D}, x.scalar_type());
  const Tensor product = unit ? device.empty({G, B, D}, ScalarType::Float) : dx;
  WeightsParams weights{};
  weights.problem = operands.problem;
  weights.coef = data_of<const double>(coef);
  weights.side = side;
  weights.dout = data_of<const float>(dout);
  weights.dout_stride = dout.stride(0);
  if (grams) {
    multiply_resident(device, operands, weights, grams, product);
  } else {
    multiply_streamed(device, operands, weights, product);
  }
  if (unit) {
    const Tensor rows = with_contiguous_rows(x);
    launch_normalise(
        {source_of(rows), data_of<const float>(product), dx.mutable_data_ptr(), G, B, true},
        math_of(x, true), device.stream());
  }
  return dx;
}

std::tuple<Tensor, Tensor> gram_mse_bwd(Tensor dout, Tensor student, Tensor teacher, Tensor coef,
                                        Tensor gram_student, Tensor gram_teacher, Tensor cross,
                                        bool need_student, bool need_teacher, std::string normalize,
                                        std::string kernel, double gamma, int64_t order,
                                        std::string algorithm, bool ieee) {
  (void)cross;
  const Device device(student);
  const Tensor* sides[2] = {&student, &teacher};
  const bool need[2] = {need_student, need_teacher};
  const ScalarType dtype = student.scalar_type();
  // weights of fp16 features could leave its range
  const Math math = dtype == ScalarType::Half ? Math::kTf32x3 : math_of(student, ieee);
  Tensor grads[2] = {device.empty({0}, dtype), device.empty({0}, dtype)};
  const bool resident = by_name(kAlgorithms, algorithm) == Algorithm::kResident;
  std::optional<Operands> operands;
  const Tensor rows = torch::stable::contiguous(coef);
  const Tensor grams[2] = {torch::stable::contiguous(gram_student),
                           torch::stable::contiguous(gram_teacher)};
  for (int side = 0; side < 2; ++side) {
    const Tensor& x = *sides[side];
    if (!need[side]) continue;
    if (x.numel() == 0) {
      grads[side] = device.empty({x.size(0), x.size(1), x.size(2)}, dtype);
      continue;
    }
    if (!operands) {
      operands.emplace(device, student, teacher, math, by_name(kNormalizations, normalize),
                       by_name(kTaylorKernels, kernel), gamma, order);
      launch_gram_mse_norms(operands->norms(), math, device.stream());
    }
    grads[side] = gradient(device, *operands, side, x, dout, rows, resident ? grams : nullptr);
  }
  return {grads[0], grads[1]};
}

}  // namespace
}  // namespace kdk::gram_mse

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_cuda, m) {
  m.def(
      "gram_mse_fwd(Tensor student, Tensor teacher, str normalize, str kernel, float gamma, int "
      "order, str algorithm, bool ieee) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gram_mse_bwd(Tensor dout, Tensor student, Tensor teacher, Tensor coef, Tensor gram_student, "
      "Tensor gram_teacher, Tensor cross, bool need_student, bool need_teacher, str normalize, str "
      "kernel, float gamma, int order, str algorithm, bool ieee) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda, KDK_CUDA_DISPATCH_KEY, m) {
  m.impl("gram_mse_fwd", TORCH_BOX(&kdk::gram_mse::gram_mse_fwd));
  m.impl("gram_mse_bwd", TORCH_BOX(&kdk::gram_mse::gram_mse_bwd));
}
