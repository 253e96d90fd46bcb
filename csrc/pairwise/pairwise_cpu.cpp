// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::pairwise_{fwd,bwd}. Arguments were checked by the public function.
#include <optional>
#include <string>
#include <tuple>

#include "../common/parallel.h"
#include "pairwise_cpu.h"
#include "pairwise_names.h"

namespace kdk::pairwise {
namespace {

// Returns an uninitialised tensor like x, which is [N, D] or [G, N, D], but with another number of
// columns.
Tensor like(const Tensor& x, int64_t columns, ScalarType type) {
  if (x.dim() == 2) return empty({x.size(0), columns}, type);
  return empty({x.size(0), x.size(1), columns}, type);
}

template <typename T>
Matrix<T> plane(const Tensor& x, int64_t g) {
  return x.dim() == 2 ? matrix<T>(x) : group<T>(x, g);
}

// The rows of both sides, as tensors of T.
template <typename T>
struct Sides {
  Tensor x;
  Optional y;

  Sides(const Tensor& x_, const Optional& y_)
      : x(contiguous_in_type<T>(x_)), y(y_ ? Optional(contiguous_in_type<T>(*y_)) : std::nullopt) {}

  // Calls f(g, rows of group g) for each group.
  template <typename F>
  void each(Metric metric, const F& f) const {
    const Tensor& other = y ? *y : x;
    const int64_t groups = x.dim() == 2 ? 1 : x.size(0), N = x.size(x.dim() - 2),
                  M = other.size(x.dim() - 2), D = x.size(x.dim() - 1);
    parallel_each(groups, 2.0 * N * M * (D + 8), [&](int64_t g) {
      f(g,
        Pair<T>(plane<const T>(x, g),
                y ? std::optional<Matrix<const T>>(plane<const T>(*y, g)) : std::nullopt, metric));
    });
  }
};

template <typename T>
Tensor fwd(const Tensor& x, const Optional& y, Metric metric, double gamma) {
  const Tensor& other = y ? *y : x;
  const Tensor out = like(x, other.size(other.dim() - 2), x.scalar_type());
  const Sides<T> sides(x, y);
  sides.each(metric, [&](int64_t g, const Pair<T>& pair) { forward<T>(pair, gamma, {out, g}); });
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor> bwd(const Tensor& dout, const Tensor& x, const Optional& y,
                               const Optional& out, Metric metric, double gamma, bool need_x,
                               bool need_y) {
  const auto result = [](const Tensor& of, bool needed) {
    return needed ? like(of, of.size(of.dim() - 1), scalar_type_of<T>)
                  : empty({0}, scalar_type_of<T>);
  };
  const Tensor dx = result(x, need_x), dy = result(y ? *y : x, need_y);
  const Sides<T> sides(x, y);
  sides.each(metric, [&](int64_t g, const Pair<T>& pair) {
    const auto of_x = need_x ? plane<T>(dx, g) : Matrix<T>{},
               of_y = need_y ? plane<T>(dy, g) : Matrix<T>{};
    const std::optional<Plane> values = out ? std::optional<Plane>({*out, g}) : std::nullopt;
    backward<T>(pair, gamma, {dout, g}, values ? &*values : nullptr, need_x ? &of_x : nullptr,
                need_y ? &of_y : nullptr);
  });
  return {in_dtype(dx, x.scalar_type()), in_dtype(dy, x.scalar_type())};
}

Tensor pairwise_fwd(Tensor x, Optional y, std::string metric, double gamma) {
  const auto run = x.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(x, y, by_name(kMetrics, metric), gamma);
}

std::tuple<Tensor, Tensor> pairwise_bwd(Tensor dout, Tensor x, Optional y, Optional out,
                                        std::string metric, double gamma, bool need_x,
                                        bool need_y) {
  const auto run = x.scalar_type() == ScalarType::Double ? bwd<double> : bwd<float>;
  return run(dout, x, y, out, by_name(kMetrics, metric), gamma, need_x, need_y);
}

}  // namespace
}  // namespace kdk::pairwise

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def("pairwise_fwd(Tensor x, Tensor? y, str metric, float gamma) -> Tensor");
  m.def(
      "pairwise_bwd(Tensor dout, Tensor x, Tensor? y, Tensor? out, str metric, float gamma, "
      "bool need_x, bool need_y) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("pairwise_fwd", TORCH_BOX(&kdk::pairwise::pairwise_fwd));
  m.impl("pairwise_bwd", TORCH_BOX(&kdk::pairwise::pairwise_bwd));
}
