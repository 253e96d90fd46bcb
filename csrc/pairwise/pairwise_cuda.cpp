// SPDX-License-Identifier: Apache-2.0
// CUDA operators kdkernels_cuda::pairwise_{fwd,bwd}. Arguments were checked by the public function.
#include "pairwise_cuda.h"

#include <string>
#include <tuple>

#include "../common/cuda/glue.h"
#include "../common/cuda/normalise.h"
#include "pairwise_names.h"

namespace kdk::pairwise {
namespace {

using namespace kdk::cuda;

constexpr int64_t kMostGroups = 0xffff;  // in one launch

int64_t groups_of(const Tensor& x) { return x.dim() == 2 ? 1 : x.size(0); }
int64_t count_rows(const Tensor& x) { return x.size(x.dim() - 2); }
int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }

// Returns an uninitialised tensor like x, which is [N, D] or [G, N, D], but with another number of
// columns.
Tensor like(const Device& device, const Tensor& x, int64_t columns, ScalarType dtype) {
  if (x.dim() == 2) return device.empty({x.size(0), columns}, dtype);
  return device.empty({x.size(0), x.size(1), columns}, dtype);
}

Strided strided_of(const Tensor& x) {
  const int64_t dim = x.dim(), size = x.element_size();
  Strided matrix{x.const_data_ptr(), dim > 2 ? x.stride(0) : 0, x.stride(dim - 2),
                 x.stride(dim - 1), false};
  const auto fits = [&](int64_t stride, int64_t count) {
    return count <= 1 || stride * size % kChunkBytes == 0;
  };
  const int64_t line = matrix.column == 1 ? matrix.row : matrix.column;
  matrix.aligned = reinterpret_cast<uintptr_t>(matrix.data) % kChunkBytes == 0 &&
                   fits(line, matrix.column == 1 ? count_rows(x) : columns_of(x)) &&
                   fits(matrix.group, groups_of(x));
  return matrix;
}

// The rows of one side, as they are given and as products take them, with a number for each row.
struct Side {
  Tensor given, multiplied;  // contiguous rows; of distances the latter may be less a point
  Math given_math, math;     // of either
  Optional numbers;          // [G, N] fp32, of any metric but kDot

  Side(const Device& device, const Tensor& x, Math math_, Metric metric)
      : given(with_contiguous_rows(x)),
        multiplied(in_dtype(given, dtype_of(math_))),
        given_math(math_of(x, true)),
        math(math_) {
    if (metric != Metric::kDot) numbers = device.empty({groups_of(x), rows()}, ScalarType::Float);
  }

  // Has `multiplied` be less a point, once the launch of row numbers has made it so.
  void move(const Device& device) {
    multiplied = like(device, given, columns_of(given), ScalarType::Float);
  }

  int64_t rows() const { return count_rows(given); }
  float* number() const { return numbers ? data_of<float>(*numbers) : nullptr; }
};

// Both sides, which are one in batch.
struct Sides {
  Metric metric;
  double gamma;
  Side x;
  std::optional<Side> y;

  Sides(const Device& device, const Tensor& x_, const Optional& y_, Math math, Metric metric_,
        double gamma_, bool backward)
      : metric(metric_), gamma(gamma_), x(device, x_, math, metric_) {
    if (y_) y.emplace(device, *y_, math, metric);
    if (metric == Metric::kDot) return;
    RowNumbersParams params{};
    const Optional point =
        is_distance(metric) ? point_of(device, (y ? *y : x).given) : std::nullopt;
    if (point) {
      params.point = data_of<const float>(*point);
      x.move(device);
      params.moved[0] = data_of<float>(x.multiplied);
      if (y) y->move(device);
      if (y) params.moved[1] = data_of<float>(y->multiplied);
    }
    params.x[0] = source_of(x.given);
    if (y) params.x[1] = source_of(y->given);
    params.number[0] = x.number();
    params.number[1] = y ? y->number() : nullptr;
    params.G = groups_of(x_);
    params.what = metric == Metric::kCosine ? RowNumber::kInverse
                  : backward                ? RowNumber::kBound
                                            : RowNumber::kSquared;
    params.metric = metric;
    params.gamma = gamma;
    params.close_share = share();
    launch_pairwise_row_numbers(params, x.given_math, device.stream());
  }

  const Side& other() const { return y ? *y : x; }
  float share() const { return close_share(x.given_math, columns_of(x.given)); }
};

Tensor pairwise_fwd(Tensor x, Optional y, std::string metric, double gamma, bool ieee) {
  const Device device(x);
  const Tensor out = like(device, x, count_rows(y ? *y : x), x.scalar_type());
  if (out.numel() == 0) return out;
  const Math math = math_of(x, ieee);
  const Sides sides(device, x, y, math, by_name(kMetrics, metric), gamma, false);
  // rows of 16 bits: docs/ops/pairwise.md derives when the rounding of a product shows
  const double share = sides.share();
  const double sharpness =
      sides.x.given.scalar_type() == ScalarType::Float ? gamma : gamma * std::min(4 * share, 1.0);
  launch_pairwise_values(
      {source_of(sides.x.multiplied), source_of(sides.other().multiplied), source_of(sides.x.given),
       source_of(sides.other().given), sides.x.number(), sides.other().number(),
       out.mutable_data_ptr(), groups_of(x), !y, sides.metric, static_cast<float>(gamma),
       static_cast<float>(share), static_cast<float>(sharpness)},
      math, device.stream());
  return out;
}

// Returns the groups from `first` on of a source, or of a strided matrix.
template <typename T>
T from_group(T x, int64_t first, int64_t element_size) {
  x.data = static_cast<const char*>(x.data) + first * x.group * element_size;
  return x;
}

// Returns dx = a b, where a is an incoming gradient whose rows are contiguous. It is not copied.
Tensor product_gradient(const Device& device, const Tensor& dout, Along along, const Tensor& other,
                        const Tensor& of, Math math) {
  const Tensor dx = like(device, of, columns_of(of), of.scalar_type());
  Product product(device, groups_of(of), count_rows(of), columns_of(of), count_rows(other), math);
  product.params.a = source_of(dout);
  product.params.b = source_of(other);
  product.params.out = dx.mutable_data_ptr();
  product.clear_semaphores();
  product.launch(along, device);
  return dx;
}

// The gradient of one side. Its steps make the weights of some rows, or of some groups, and
// multiply them with the other side; for distances they then finish the gradient.
class Gradient {
 public:
  Gradient(const Device& device, const Sides& sides, const Side& of, const Side& other,
           Strided dout, Strided values)
      : device_(device),
        sides_(sides),
        of_(of),
        other_(other),
        dout_(dout),
        values_(values),
        G_(groups_of(of.given)),
        N_(of.rows()),
        M_(other.rows()),
        D_(columns_of(of.given)) {}

  Tensor run() const {
    const Metric metric = sides_.metric;
    const Tensor dx = like(device_, of_.given, D_, of_.given.scalar_type());
    const int64_t row_bytes = M_ * element_bytes(of_.math);
    const int64_t rows = rows_in_l2(N_, row_bytes);
    const int64_t most = std::min(G_, kMostGroups);
    const int64_t groups =
        rows < N_ ? 1 : std::clamp<int64_t>(l2_bytes() / 2 / (N_ * row_bytes), 1, most);
    const int64_t pieces = is_distance(metric) ? ceil_div(M_, kPiece) : 0;
    const Step step{device_.empty({groups, rows, M_}, dtype_of(of_.math)),
                    device_.empty({groups, pieces, rows}, ScalarType::Float),
                    device_.empty({groups, pieces, rows}, ScalarType::Byte),
                    metric == Metric::kDot
                        ? dx
                        : device_.empty({is_distance(metric) ? groups * rows : G_ * N_, D_},
                                        ScalarType::Float)};
    for (int64_t g = 0; g < G_; g += groups) {
      for (int64_t first = 0; first < N_; first += rows)
        add(step, g, std::min(groups, G_ - g), first, std::min(rows, N_ - first), dx);
    }
    if (metric == Metric::kCosine)
      launch_normalise({source_of(of_.given), data_of<const float>(step.product),
                        dx.mutable_data_ptr(), G_, N_, false},
                       of_.given_math, device_.stream());
    return dx;
  }

 private:
  // The memory that steps use in turn.
  struct Step {
    Tensor weights, sums, close;
    Tensor product;  // of a step (distances), or of all of them
  };

  // Makes the gradient of `rows` rows from row `first` on, in `groups` groups from group g on.
  void add(const Step& step, int64_t g, int64_t groups, int64_t first, int64_t rows,
           const Tensor& dx) const {
    const int64_t given = of_.given.element_size();
    PairsParams pairs{};
    pairs.dout = from_group(dout_, g, given);
    pairs.values = from_group(values_, g, given);
    if (sides_.metric != Metric::kDot) {
      pairs.number = of_.number() + g * N_;
      pairs.other_number = other_.number() + g * M_;
    }
    pairs.groups = groups;
    pairs.first = first;
    pairs.rows = rows;
    pairs.all_rows = N_;
    pairs.cols = M_;
    pairs.in_batch = !sides_.y;
    pairs.metric = sides_.metric;
    pairs.gamma = static_cast<float>(sides_.gamma);
    pairs.sums = data_of<float>(step.sums);
    pairs.close = data_of<uint8_t>(step.close);

    const bool distance = is_distance(sides_.metric);
    Product product(device_, groups, rows, D_, M_, of_.math);
    product.params.a = source_of(step.weights);
    product.params.a.rows = rows;
    product.params.b =
        from_group(source_of(other_.multiplied), g, other_.multiplied.element_size());
    product.params.out_dtype = stored_as(step.product.scalar_type());
    product.params.out = data_of<char>(step.product) +
                         (distance ? 0 : (g * N_ + first) * D_ * step.product.element_size());
    launch_pairwise_bwd_weights({pairs, step.weights.mutable_data_ptr(), product.params.semaphores,
                                 product.semaphore_count()},
                                of_.given_math, device_.stream());
    product.launch(Along::kContraction, device_);
    if (distance)
      launch_pairwise_bwd_gradient(
          {pairs, from_group(source_of(of_.given), g, given),
           from_group(source_of(other_.given), g, given),
           from_group(
               source_of(of_.given.scalar_type() == ScalarType::Float ? of_.multiplied : of_.given),
               g, given),
           data_of<const float>(step.product), data_of<char>(dx) + g * N_ * D_ * given},
          of_.given_math, device_.stream());
  }

  const Device& device_;
  const Sides& sides_;
  const Side &of_, &other_;
  Strided dout_, values_;
  int64_t G_, N_, M_, D_;
};

// Returns a gradient of zeros, for where there is no pair or no feature.
Tensor nothing(const Device& device, const Tensor& of) {
  Tensor dx = like(device, of, columns_of(of), of.scalar_type());
  return torch::stable::zero_(dx);
}

std::tuple<Tensor, Tensor> pairwise_bwd(Tensor dout, Tensor x, Optional y, Optional out,
                                        std::string metric_name, double gamma, bool need_x,
                                        bool need_y, bool ieee) {
  const Device device(x);
  const Metric metric = by_name(kMetrics, metric_name);
  Tensor dx = device.empty({0}, x.scalar_type()), dy = device.empty({0}, x.scalar_type());
  if (dout.numel() == 0 || x.numel() == 0) {
    if (need_x) dx = nothing(device, x);
    if (need_y) dy = nothing(device, *y);
    return {dx, dy};
  }
  if (metric == Metric::kDot && y && dout.stride(dout.dim() - 1) == 1 &&
      groups_of(x) <= kMostGroups) {
    const Math math = math_of(x, ieee);
    const Tensor a = with_contiguous_rows(x), b = with_contiguous_rows(*y);
    if (need_x) dx = product_gradient(device, dout, Along::kContraction, b, a, math);
    if (need_y) dy = product_gradient(device, dout, Along::kOutput, a, b, math);
    return {dx, dy};
  }
  // fp16 could not hold what a slope makes of an incoming gradient
  const Math math = x.scalar_type() == ScalarType::Half ? Math::kTf32x3 : math_of(x, ieee);
  const Sides sides(device, x, y, math, metric, gamma, true);
  const Strided gradient = strided_of(dout),
                values = is_distance(metric) ? strided_of(*out) : Strided{};
  if (need_x) dx = Gradient(device, sides, sides.x, sides.other(), gradient, values).run();
  if (need_y)
    dy = Gradient(device, sides, *sides.y, sides.x, gradient.transposed(), values.transposed())
             .run();
  return {dx, dy};
}

}  // namespace
}  // namespace kdk::pairwise

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_cuda, m) {
  m.def("pairwise_fwd(Tensor x, Tensor? y, str metric, float gamma, bool ieee) -> Tensor");
  m.def(
      "pairwise_bwd(Tensor dout, Tensor x, Tensor? y, Tensor? out, str metric, float gamma, "
      "bool need_x, bool need_y, bool ieee) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda, KDK_CUDA_DISPATCH_KEY, m) {
  m.impl("pairwise_fwd", TORCH_BOX(&kdk::pairwise::pairwise_fwd));
  m.impl("pairwise_bwd", TORCH_BOX(&kdk::pairwise::pairwise_bwd));
}
