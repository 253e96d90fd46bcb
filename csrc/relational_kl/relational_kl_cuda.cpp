// SPDX-License-Identifier: Apache-2.0
// CUDA operators kdkernels_cuda::relational_kl_{fwd,bwd}. Arguments were checked by the public
// functions.
#include "relational_kl_cuda.h"

#include <utility>

#include "relational_kl_call.h"

namespace kdk::relational_kl {
namespace {

// Returns the entries of a row of weights: whole stores of a thread.
int64_t padded(int64_t K) { return round_up(K, kGroup); }

// Returns a product of the weights or derivatives that a sweep left, with keys or rows; its result
// is fp32.
Product product_with(const Device& device, const Source& b, int64_t M, int64_t N, int64_t K,
                     Math math) {
  Product product(device, 1, M, N, K, math);
  product.params.b = b;
  product.params.out_dtype = Dtype::kFloat;
  return product;
}

// Returns a product of the weights of M rows with keys [K, N]. It is split into whole tiles of
// keys, because each tile has its factor: into as many splits as fill the device twice, while a
// split has two tiles.
ProductParams difference_product(const Source& keys, int64_t M, int64_t N, float* out) {
  ProductParams params{};
  params.b = keys;
  params.out = out;
  params.M = M;
  params.N = N;
  params.K = keys.rows;
  params.tiles = ceil_div(M, kTile) * ceil_div(N, kTile);
  const int64_t key_tiles = ceil_div(params.K, kTile);
  const int64_t most =
      std::max<int64_t>(std::min(ceil_div(2 * processors(), params.tiles), key_tiles / 2), 1);
  params.split_length = ceil_div(key_tiles, most) * kTile;
  params.splits = static_cast<int>(ceil_div(params.K, params.split_length));
  return params;
}

Results fwd(const Arguments& given, const ForwardArguments& with, bool ieee) {
  const Device device(given.student);
  const int64_t B = given.student.size(0), D = given.student.size(1), K = given.keys.size(0);
  const bool need_student = with.need_student;
  const Tensor loss = device.empty({B}, ScalarType::Float),
               numbers = device.empty({kNumbers, B}, ScalarType::Float);
  const int64_t banks = !given.normalize ? 0 : given.teacher_keys ? 2 : 1;
  const Tensor key_scales = device.empty({banks, K}, ScalarType::Float);
  const Tensor dloss =
      need_student ? device.empty({B, D}, ScalarType::Float) : device.empty({0}, ScalarType::Float);
  const Given known(given, numbers, key_scales);
  known.find_scales(device, with);
  if (B == 0) return {loss, dloss, numbers, key_scales};
  const Call call(device, given, known, ieee);
  const Math math = call.math;
  const bool multiply = need_student && D > 0;
  const int64_t stride = padded(K), key_tiles = ceil_div(K, kTile);
  const int64_t row_bytes = (call.teacher ? 2 : 1) * stride * int64_t(element_bytes(math));
  const int64_t step = multiply ? rows_in_l2(B, row_bytes) : B;
  const int64_t rows = call.rows_of_queries(step);
  const Tensor weights = device.empty({multiply ? rows : 0, stride}, dtype_of(math));
  const Tensor maxima = device.empty({multiply ? key_tiles : 0, rows}, ScalarType::Float);
  const Tensor positive = device.empty({call.teacher ? 0 : B}, ScalarType::Float);
  const Tensor softmax = device.empty({4, multiply ? step : 0}, ScalarType::Float);
  for (int64_t first = 0; first < B; first += step) {
    const int64_t count = std::min(step, B - first);
    WeightsParams sums{};
    sums.sweep = call.queries(first, count);
    const SweepParams& sweep = sums.sweep;
    const int64_t splits = ceil_div(key_tiles, sweep.tiles);
    const Tensor parts = device.empty({splits, 3, sweep.operand.rows}, ScalarType::Float);
    sums.parts = data_of<float>(parts);
    sums.positive = data_of<float>(positive) + (call.teacher ? 0 : first);
    sums.stride = stride;
    if (multiply) {
      sums.weights = weights.mutable_data_ptr();
      sums.maxima = data_of<float>(maxima);
    }
    launch_relational_kl_weights(sums, math, device.stream());
    MergeParams merge{};
    merge.parts = sums.parts;
    merge.positive = sums.positive;
    merge.splits = splits;
    merge.rows = sweep.operand.rows;
    merge.B = count;
    merge.K = K;
    merge.num_keys = sweep.num_keys;
    merge.exclude = sweep.exclude;
    merge.positives = sweep.positives;
    merge.teacher = call.teacher;
    merge.subtract_entropy = given.subtract_entropy;
    if (given.own_keys) merge.own_student = known.known(kOwnStudent) + first;
    if (given.own_keys && given.teacher) merge.own_teacher = known.known(kOwnTeacher) + first;
    merge.loss = data_of<float>(loss) + first;
    merge.lse_student = known.known(kLseStudent) + first;
    merge.lse_teacher = known.known(kLseTeacher) + first;
    merge.softmax = multiply ? data_of<float>(softmax) : nullptr;
    launch_relational_kl_merge(merge, device.stream());
    if (!multiply) continue;
    DifferenceParams difference{};
    difference.product =
        difference_product(call.all.keys[0], count, D, data_of<float>(dloss) + first * D);
    ProductParams& product = difference.product;
    product.counting = call.all.num_keys;
    const bool split = product.splits > 1;
    const Tensor partials = device.empty({split ? product.splits : 0, count, D}, ScalarType::Float);
    void* const out = std::exchange(product.out, split ? partials.mutable_data_ptr() : product.out);
    difference.weights = sums.weights;
    difference.stride = stride;
    difference.rows = sweep.operand.rows;
    difference.maxima = sums.maxima;
    difference.softmax = merge.softmax;
    difference.positives = sweep.positives;
    difference.teacher = call.teacher;
    difference.scale = sweep.scale[0];
    launch_relational_kl_difference(difference, math, device.stream());
    if (split)
      launch_part_sums(
          {data_of<const float>(partials), out, product.splits, count * D, Dtype::kFloat},
          device.stream());
  }
  return {loss, dloss, numbers, key_scales};
}

// The residuals that the second sweep reads, and the incoming gradient.
struct Residuals {
  const Tensor &dout, &loss;
  const Given& known;

  DerivativesParams params(const SweepParams& sweep, int64_t first) const {
    DerivativesParams params{};
    params.sweep = sweep;
    params.loss = data_of<const float>(loss) + first;
    params.lse_student = known.known(kLseStudent) + first;
    params.lse_teacher = known.known(kLseTeacher) + first;
    params.dout = data_of<const float>(dout) + first * dout.stride(0);
    params.dout_stride = dout.stride(0);
    return params;
  }
};

// Makes derivatives by the teacher times its scales in chunks of rows: each row needs one chunk
// only.
void teacher_derivatives(const Device& device, const Call& call, const Residuals& residuals,
                         const Tensor& dteacher) {  // [B, E]
  const int64_t E = dteacher.size(1), stride = padded(call.K);
  const int64_t step = rows_in_l2(call.B, stride * int64_t(element_bytes(call.math)));
  const Tensor h = device.empty({step, stride}, dtype_of(call.math));
  for (int64_t first = 0; first < call.B; first += step) {
    const int64_t count = std::min(step, call.B - first);
    auto product = product_with(device, call.all.keys[1], count, E, call.K, call.math);
    product.params.a = rows_of(source_of(h), 0, count, call.math);
    product.params.a.cols = call.K;
    product.params.counting = call.all.num_keys;
    product.params.out = data_of<float>(dteacher) + first * E;
    auto params = residuals.params(call.queries(first, count), first);
    params.only_teacher = true;
    params.out = h.mutable_data_ptr();
    params.stride = stride;
    params.semaphores = product.params.semaphores;
    params.semaphore_count = product.semaphore_count();
    launch_relational_kl_bwd_derivatives(params, call.math, device.stream());
    product.launch(Along::kContraction, device);
  }
}

// Makes derivatives by keys times their scales in chunks of keys: each key needs one chunk only.
// Where both sides share a bank, one product over the rows of both makes its gradient. Where there
// are two banks, each meets zeros in the rows of the other side.
void key_derivatives(const Device& device, const Call& call, const Residuals& residuals,
                     const Tensor (&grads)[2]) {  // [K, D] and [K, E], or empty
  const int64_t rows = call.all.operand.rows;
  const int64_t step = rows_in_l2(call.K, rows * int64_t(element_bytes(call.math)));
  const Tensor g = device.empty({rows, padded(step)}, dtype_of(call.math));
  for (int64_t first = 0; first < call.K; first += step) {
    const int64_t count = std::min(step, call.K - first);
    auto params = residuals.params(call.keys(first, count), 0);
    params.out = g.mutable_data_ptr();
    params.stride = g.stride(0);
    std::optional<Product> products[2];
    int64_t semaphore_count = 0;
    for (int bank = 0; bank < 2; ++bank) {
      if (grads[bank].numel() == 0) continue;
      const int64_t D = grads[bank].size(1);
      auto& product = products[bank];
      product.emplace(product_with(device, call.rows_meeting(bank, D), count, D, rows, call.math));
      product->params.a = source_of(g);
      product->params.a.cols = count;
      product->params.out = data_of<float>(grads[bank]) + first * D;
      semaphore_count += product->semaphore_count();
    }
    const Tensor zeros = device.empty({semaphore_count}, ScalarType::Int);
    params.semaphores = data_of<unsigned>(zeros);
    params.semaphore_count = semaphore_count;
    launch_relational_kl_bwd_derivatives(params, call.math, device.stream());
    unsigned* next = params.semaphores;
    for (auto& product : products) {
      if (!product) continue;
      product->params.semaphores = next;
      next += product->semaphore_count();
      product->launch(Along::kOutput, device);
    }
  }
}

BackwardResults bwd(const Arguments& given, const BackwardArguments& with, bool ieee) {
  const Device device(given.student);
  const int64_t B = given.student.size(0);
  const Tensor loss = torch::stable::contiguous(with.loss);
  const Given known(given, torch::stable::contiguous(with.numbers),
                    torch::stable::contiguous(with.key_scales));
  const auto result = [&](const Optional& like, bool needed, ScalarType dtype) {
    if (!needed) return device.empty({0}, dtype);
    const int64_t rows = like->size(0), cols = like->size(1);
    return B == 0 ? device.zeros({rows, cols}, dtype) : device.empty({rows, cols}, dtype);
  };
  const Tensor dstudent = result(given.student, with.need_student, known.dtype),
               dteacher = result(given.teacher, with.need_teacher, known.dtype),
               down_keys = result(given.own_keys, with.need_own_keys, known.dtype);
  const Tensor dkeys[2] = {result(given.keys, with.need_keys, known.dtype),
                           result(given.teacher_keys, with.need_teacher_keys, known.dtype)};
  const Tensor dfactor[2] = {device.empty({with.need_student_factor ? B : 0}, ScalarType::Float),
                             device.empty({with.need_teacher_factor ? B : 0}, ScalarType::Float)};
  const BackwardResults results{dstudent,  dteacher,   dkeys[0],  dkeys[1],
                                down_keys, dfactor[0], dfactor[1]};
  if (B == 0) return results;
  RowGradientsParams rows{};
  rows.x[0] = known.rows(Given::kStudent);
  rows.x[1] = known.rows(Given::kTeacher);
  rows.own = known.rows(Given::kOwnKeys);
  rows.num_keys = data_or_null<int64_t>(given.num_keys);
  rows.normalize = known.normalize;
  rows.subtract_entropy = known.subtract_entropy;
  rows.numbers = known.known(0);
  rows.loss = data_of<const float>(loss);
  rows.dout = data_of<const float>(with.dout);
  rows.dout_stride = with.dout.stride(0);
  rows.B = B;
  const auto finish = [&](Of of, const float* v, const Tensor& out, int64_t count) {
    rows.of = of;
    rows.v = v;
    rows.out = out.dim() == 2 ? out.mutable_data_ptr() : nullptr;
    launch_relational_kl_bwd_rows(rows, count, stored_as(known.dtype), device.stream());
  };
  const auto finish_side = [&](int side, const float* v, const Tensor& out) {
    rows.factor = known.factor(side);
    rows.dfactor = dfactor[side].numel() > 0 ? data_of<float>(dfactor[side]) : nullptr;
    finish(side == 0 ? Of::kStudent : Of::kTeacher, v, out, B);
    rows.dfactor = nullptr;
  };
  if (with.need_student || with.need_student_factor) {
    const Tensor dloss = torch::stable::contiguous(with.dloss);
    finish_side(0, data_of<const float>(dloss), dstudent);
  }
  if (with.need_own_keys) finish(Of::kOwnKeys, nullptr, down_keys, B);
  const bool of_teacher = with.need_teacher || with.need_teacher_factor,
             of_keys = with.need_keys || with.need_teacher_keys;
  if (!of_teacher && !of_keys) return results;
  const Call call(device, given, known, ieee);
  const Residuals residuals{with.dout, loss, known};
  // Derivatives are fp32, and become gradients where they are if these are fp32, too.
  const auto room = [&](const Tensor& out, const Optional& like, bool needed) {
    if (!needed || (out.dim() == 2 && known.dtype == ScalarType::Float)) return out;
    return device.empty({like->size(0), like->size(1)}, ScalarType::Float);
  };
  if (of_teacher) {
    const Tensor v = room(dteacher, given.teacher, true);
    if (v.numel() > 0) teacher_derivatives(device, call, residuals, v);
    finish_side(1, data_of<const float>(v), dteacher);
  }
  if (of_keys) {
    const Tensor v[2] = {room(dkeys[0], given.keys, with.need_keys),
                         room(dkeys[1], given.teacher_keys, with.need_teacher_keys)};
    if (v[0].numel() + v[1].numel() > 0) key_derivatives(device, call, residuals, v);
    for (int bank = 0; bank < 2; ++bank) {
      if (dkeys[bank].numel() == 0) continue;
      rows.keys = known.rows(bank == 0 ? Given::kKeys : Given::kTeacherKeys);
      rows.key_scales = known.key_scales(bank);
      finish(Of::kKeys, data_of<const float>(v[bank]), dkeys[bank], known.K);
    }
  }
  return results;
}

// The operators, for the list of types of their shared arguments.
template <typename Shared>
struct Operators;

template <typename... Ts>
struct Operators<Types<Ts...>> {
  static Results fwd(Ts... shared, double student_temperature, double teacher_temperature,
                     bool need_student, bool ieee) {
    return relational_kl::fwd({std::move(shared)...},
                              {student_temperature, teacher_temperature, need_student}, ieee);
  }

  static BackwardResults bwd(Tensor dout, Ts... shared, Tensor loss, Tensor dloss, Tensor numbers,
                             Tensor key_scales, bool need_student, bool need_teacher,
                             bool need_keys, bool need_teacher_keys, bool need_own_keys,
                             bool need_student_factor, bool need_teacher_factor, bool ieee) {
    return relational_kl::bwd(
        {std::move(shared)...},
        {dout, loss, dloss, numbers, key_scales, need_student, need_teacher, need_keys,
         need_teacher_keys, need_own_keys, need_student_factor, need_teacher_factor},
        ieee);
  }
};

using Native = Operators<ArgumentTypes>;

}  // namespace
}  // namespace kdk::relational_kl

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_cuda, m) {
  m.def(kdk::relational_kl::fwd_schema(", bool ieee").c_str());
  m.def(kdk::relational_kl::bwd_schema(", bool ieee").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda, KDK_CUDA_DISPATCH_KEY, m) {
  m.impl("relational_kl_fwd", TORCH_BOX(&kdk::relational_kl::Native::fwd));
  m.impl("relational_kl_bwd", TORCH_BOX(&kdk::relational_kl::Native::bwd));
}
