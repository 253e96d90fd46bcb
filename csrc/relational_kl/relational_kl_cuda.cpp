// SPDX-License-Identifier: Apache-2.0
// CUDA operators kdkernels_cuda::relational_kl_{fwd,bwd}. Arguments were checked by the public
// functions.
#include "relational_kl_cuda.h"

#include <limits>
#include <utility>

#include "../common/cuda/glue.h"
#include "relational_kl_arguments.h"

namespace kdk::relational_kl {
namespace {

using namespace kdk::cuda;

Math math_of_keys(const Tensor& keys, bool ieee) {
  // the softmaxes' difference over norms of keys could leave the range of fp16
  return keys.scalar_type() == ScalarType::Half ? Math::kTf32x3 : math_of(keys, ieee);
}

template <typename T>
const T* data_or_null(const Optional& x) {
  return x ? data_of<const T>(*x) : nullptr;
}

// Returns how many tiles of keys a block has. Blocks run in waves, and a wave takes as long as the
// tiles of a block and the filling of its pipeline, which takes about as long as one more tile.
int tiles_of_block(int64_t row_tiles, int64_t key_tiles) {
  constexpr int64_t kMost = 64, kGrid = 65535;  // blocks along the axis of keys
  const int64_t at_once = 2 * processors(), fewest = ceil_div(key_tiles, kGrid);
  int64_t best = fewest, least = std::numeric_limits<int64_t>::max();
  for (int64_t tiles = fewest; tiles <= std::max(fewest, std::min(key_tiles, kMost)); ++tiles) {
    const int64_t waves = ceil_div(row_tiles * ceil_div(key_tiles, tiles), at_once);
    const int64_t time = waves * (tiles + 1);
    if (time > least) continue;
    best = tiles;
    least = time;
  }
  return static_cast<int>(best);
}

// The tensors of a call in the form that kernels read, with the rows of both sides as one operand.
class Call {
 public:
  Call(const Device& device, const Arguments& given, bool ieee)
      : math(math_of_keys(given.keys, ieee)),
        B(given.student.size(0)),
        K(given.keys.size(0)),
        teacher(given.teacher.has_value()),
        two_banks(given.teacher_keys.has_value()),
        keys_(with_contiguous_rows(in_dtype(given.keys, dtype_of(math)))),
        teacher_keys_(two_banks
                          ? with_contiguous_rows(in_dtype(*given.teacher_keys, dtype_of(math)))
                          : keys_),
        scale_{contiguous(given.key_scale),
               contiguous(two_banks ? given.teacher_key_scale : given.key_scale)},
        positives_(contiguous(given.positives)),
        exclude_(contiguous(given.exclude)),
        num_keys_(given.num_keys) {
    const Tensor student = with_contiguous_rows(given.student),
                 other = teacher ? with_contiguous_rows(*given.teacher) : student;
    const int step = kStepBytes / static_cast<int>(element_bytes(math));
    const auto steps = [&](const Tensor& bank) {
      return static_cast<int>(std::max<int64_t>(ceil_div(bank.size(1), step), 1));
    };
    Operand& operand = all.operand;
    operand.steps[0] = steps(keys_);
    operand.steps[1] = two_banks ? steps(teacher_keys_) : 0;
    operand.width = (operand.steps[0] + operand.steps[1]) * step;
    operand.rows = rows_of_queries(B);
    rows_.emplace(device.empty({operand.rows, pieces_of(math), operand.width}, dtype_of(math)));
    operand.data = rows_->mutable_data_ptr();
    launch_relational_kl_prepare({{source_of(student), source_of(other)}, operand, teacher}, math,
                                 device.stream());
    all.keys[0] = source_of(keys_);
    all.keys[1] = source_of(teacher_keys_);
    for (int side = 0; side < 2; ++side) all.scale[side] = data_or_null<float>(scale_[side]);
    all.B = B;
    all.K = all.all = K;
    all.num_keys = data_or_null<int64_t>(num_keys_);
    all.exclude = data_or_null<int64_t>(exclude_);
    all.positives = data_or_null<int64_t>(positives_);
    all.teacher = teacher;
    all.subtract_entropy = given.subtract_entropy;
  }

  // Returns how many rows of the operand hold so many queries.
  int64_t rows_of_queries(int64_t count) const {
    return round_up(teacher ? 2 * round_up(count, kGroup) : count, kTile);
  }

  // Returns a sweep of `count` queries from query `first` on, which begins a tile, against all
  // keys.
  SweepParams queries(int64_t first, int64_t count) const {
    SweepParams part = all;
    part.operand.data = data_of<char>(*rows_) + (teacher ? 2 : 1) * first * pieces_of(math) *
                                                    all.operand.width * rows_->element_size();
    part.operand.rows = rows_of_queries(count);
    part.B = count;
    if (part.exclude) part.exclude += first;
    if (part.positives) part.positives += first;
    part.tiles = tiles_of_block(part.operand.rows / kTile, ceil_div(K, kTile));
    return part;
  }

  // Returns a sweep of all queries against `count` keys from key `first` on.
  SweepParams keys(int64_t first, int64_t count) const {
    SweepParams part = all;
    for (int side = 0; side < 2; ++side) {
      part.keys[side] = rows_of(all.keys[side], first, count, math);
      if (part.scale[side]) part.scale[side] += first;
    }
    part.K = count;
    part.first = first;
    part.tiles = tiles_of_block(part.operand.rows / kTile, ceil_div(count, kTile));
    return part;
  }

  // Returns D columns of the rows that a bank meets, as operand b of a product over these rows.
  Source rows_meeting(int bank, int64_t D) const {
    Source source = source_of(*rows_);
    source.data = data_of<char>(*rows_) + (bank == 0 ? 0 : all.operand.steps[0] * kStepBytes);
    source.rows = all.operand.rows;
    source.cols = D;
    source.stride = pieces_of(math) * all.operand.width;
    source.group = 0;
    return source;
  }

  const Math math;
  const int64_t B, K;
  const bool teacher, two_banks;
  SweepParams all{};

 private:
  Tensor keys_, teacher_keys_;
  Optional scale_[2], positives_, exclude_, num_keys_;
  Optional rows_;
};

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

Results fwd(const Arguments& given, const Optional& own_student, const Optional& own_teacher,
            bool need_student, bool ieee) {
  const Device device(given.student);
  const int64_t B = given.student.size(0), D = given.student.size(1), K = given.keys.size(0);
  const Tensor loss = device.empty({B}, ScalarType::Float),
               lse_student = device.empty({B}, ScalarType::Float),
               lse_teacher = device.empty({B}, ScalarType::Float);
  const Tensor dloss =
      need_student ? device.empty({B, D}, ScalarType::Float) : device.empty({0}, ScalarType::Float);
  if (B == 0) return {loss, dloss, lse_student, lse_teacher};
  const Call call(device, given, ieee);
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
  const Optional own[2] = {contiguous(own_student), contiguous(own_teacher)};
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
    if (own[0]) merge.own_student = data_of<const float>(*own[0]) + first;
    if (own[1]) merge.own_teacher = data_of<const float>(*own[1]) + first;
    merge.loss = data_of<float>(loss) + first;
    merge.lse_student = data_of<float>(lse_student) + first;
    merge.lse_teacher = data_of<float>(lse_teacher) + first;
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
  return {loss, dloss, lse_student, lse_teacher};
}

// The residuals that the second sweep reads, and the incoming gradient.
struct Residuals {
  const Tensor &dout, &loss, &lse_student, &lse_teacher;

  DerivativesParams params(const SweepParams& sweep, int64_t first) const {
    DerivativesParams params{};
    params.sweep = sweep;
    params.loss = data_of<const float>(loss) + first;
    params.lse_student = data_of<const float>(lse_student) + first;
    params.lse_teacher = data_of<const float>(lse_teacher) + first;
    params.dout = data_of<const float>(dout) + first * dout.stride(0);
    params.dout_stride = dout.stride(0);
    return params;
  }
};

// Makes dteacher in chunks of rows: each row of dteacher needs one chunk only.
void teacher_gradient(const Device& device, const Call& call, const Residuals& residuals,
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

// Makes the gradients of keys in chunks of keys: each row of them needs one chunk only. Where both
// sides share a bank, one product over the rows of both makes its gradient. Where there are two
// banks, each meets zeros in the rows of the other side.
void key_gradients(const Device& device, const Call& call, const Residuals& residuals,
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

Results bwd(const Arguments& given, const BackwardArguments& with, bool ieee) {
  const Device device(given.student);
  const int64_t B = given.student.size(0);
  const auto result = [&](const Optional& like, bool needed) {
    if (!needed) return device.empty({0}, ScalarType::Float);
    const int64_t rows = like->size(0), cols = like->size(1);
    return B == 0 ? device.zeros({rows, cols}, ScalarType::Float)
                  : device.empty({rows, cols}, ScalarType::Float);
  };
  const Tensor dstudent = with.need_student
                              ? scaled_rows(device, with.dloss, with.dout, ScalarType::Float)
                              : device.empty({0}, ScalarType::Float);
  const Tensor dteacher = result(given.teacher, with.need_teacher);
  const Tensor by_keys[2] = {result(given.keys, with.need_keys),
                             result(given.teacher_keys, with.need_teacher_keys)};
  const bool of_keys = by_keys[0].numel() + by_keys[1].numel() > 0;
  if (B > 0 && (dteacher.numel() > 0 || of_keys)) {
    const Call call(device, given, ieee);
    const Tensor rows[3] = {torch::stable::contiguous(with.loss),
                            torch::stable::contiguous(with.lse_student),
                            torch::stable::contiguous(with.lse_teacher)};
    const Residuals residuals{with.dout, rows[0], rows[1], rows[2]};
    if (dteacher.numel() > 0) teacher_gradient(device, call, residuals, dteacher);
    if (of_keys) key_gradients(device, call, residuals, by_keys);
  }
  return {dstudent, dteacher, by_keys[0], by_keys[1]};
}

// The operators, for the list of types of their shared arguments.
template <typename Shared>
struct Operators;

template <typename... Ts>
struct Operators<Types<Ts...>> {
  static Results fwd(Ts... shared, Optional own_student, Optional own_teacher, bool need_student,
                     bool ieee) {
    return relational_kl::fwd({std::move(shared)...}, own_student, own_teacher, need_student, ieee);
  }

  static Results bwd(Tensor dout, Ts... shared, Tensor loss, Tensor dloss, Tensor lse_student,
                     Tensor lse_teacher, bool need_student, bool need_teacher, bool need_keys,
                     bool need_teacher_keys, bool ieee) {
    return relational_kl::bwd({std::move(shared)...},
                              {dout, loss, dloss, lse_student, lse_teacher, need_student,
                               need_teacher, need_keys, need_teacher_keys},
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
