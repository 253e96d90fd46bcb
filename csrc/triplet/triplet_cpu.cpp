// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::triplet_{fwd,bwd}. Arguments were checked by the public function.
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../common/unit_rows.h"
#include "../pairs/distance_names.h"
#include "../pairs/margin_math.h"
#include "triplet_mine.h"

namespace kdk::triplet {
namespace {

using pairs::Distance, pairs::from_squared, pairs::slope;

// What a triplet costs: f(u) at u = d_ap - d_an + margin, the hinge or, if `soft`, the softplus.
struct Cost {
  double margin;
  bool soft;

  template <typename T>
  T u(T d_ap, T d_an) const {
    return d_ap - d_an + static_cast<T>(margin);
  }
  template <typename T>
  T loss(T u) const {
    return soft ? pairs::softplus(u).loss : pairs::hinge(u).loss;
  }
  // Of the hinge it is 1 where u is NaN, so that the distance that is NaN shows in the gradient.
  template <typename T>
  T slope(T u) const {
    return soft ? pairs::softplus(u).slope : u <= 0 ? T(0) : T(1);
  }
};

// The rows of both sides as they are compared, contiguous in T.
template <typename T>
struct Rows {
  Tensor given_x, given_r, x, r;

  Rows(const Tensor& embeddings, const Tensor& references, bool in_batch, bool normalize)
      : given_x(contiguous_in_type<T>(embeddings)),
        given_r(in_batch ? given_x : contiguous_in_type<T>(references)),
        x(normalize ? unit_rows<T>(given_x) : given_x),
        r(in_batch    ? x
          : normalize ? unit_rows<T>(given_r)
                      : given_r) {}
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Results fwd(const Tensor& embeddings, const Tensor& labels, const Tensor& references,
            const Tensor& reference_labels, bool in_batch, const Optional& exclude, bool normalize,
            Strategy positives, Strategy negatives, const Cost& cost, Distance distance) {
  const int64_t B = embeddings.size(0), D = embeddings.size(1);
  const Tensor positive = empty({B}, ScalarType::Long), negative = empty({B}, ScalarType::Long);
  const Tensor d_ap = empty({B}, scalar_type_of<T>), d_an = empty({B}, scalar_type_of<T>);
  const Tensor losses = empty({B}, scalar_type_of<T>), total = empty({}, scalar_type_of<T>);
  const Tensor nonzero = empty({}, ScalarType::Long), kept = empty({}, ScalarType::Long);
  const Rows<T> sides(embeddings, references, in_batch, normalize);
  const Tensor &x = sides.x, &r = sides.r;
  const Labelled<T> sorted(x, labels, r, reference_labels, in_batch, exclude);
  Search<T> p(true, positives == Strategy::kEasiest, B),
      n(false, negatives != Strategy::kEasiest, B);
  const auto* rows = static_cast<const T*>(x.const_data_ptr());
  const auto* other_rows = static_cast<const T*>(r.const_data_ptr());
  mine(Miner<T>(sorted, rows, other_rows), positives, negatives, p, n);
  parallel_each(B, 4.0 * D, [&](int64_t i) {
    const int64_t row = sorted.anchors.row[i];
    const bool valid = p.best[i].row >= 0 && n.best[i].row >= 0;
    const auto from_difference = [&](const Best<T>& best) {
      if (!valid) return T(0);
      if (best.key == kNanKey<T>) return std::numeric_limits<T>::quiet_NaN();
      const double d2 =
          rows::loops<T>().squared_difference(rows + row * D, other_rows + best.row * D, D);
      return static_cast<T>(from_squared(d2, distance));
    };
    const T ap = from_difference(p.best[i]), an = from_difference(n.best[i]);
    static_cast<int64_t*>(positive.mutable_data_ptr())[row] = valid ? p.best[i].row : -1;
    static_cast<int64_t*>(negative.mutable_data_ptr())[row] = valid ? n.best[i].row : -1;
    static_cast<T*>(d_ap.mutable_data_ptr())[row] = ap;
    static_cast<T*>(d_an.mutable_data_ptr())[row] = an;
    static_cast<T*>(losses.mutable_data_ptr())[row] = valid ? cost.loss(cost.u(ap, an)) : T(0);
  });
  double sum = 0;
  int64_t positive_losses = 0, triplets = 0;
  for (int64_t i = 0; i < B; ++i) {
    const T loss = static_cast<const T*>(losses.const_data_ptr())[i];
    sum += loss;
    positive_losses += loss > 0;
    triplets += static_cast<const int64_t*>(positive.const_data_ptr())[i] >= 0;
  }
  *static_cast<T*>(total.mutable_data_ptr()) = static_cast<T>(sum);
  *static_cast<int64_t*>(nonzero.mutable_data_ptr()) = positive_losses;
  *static_cast<int64_t*>(kept.mutable_data_ptr()) = triplets;
  return {total, nonzero, kept, losses, positive, negative, d_ap, d_an};
}

// What an anchor and a row that it chose contribute to the gradients of both.
template <typename T>
struct Contribution {
  int64_t anchor;
  T factor;  // of (anchor - row) in the gradient of the anchor
};

template <typename T>
std::tuple<Tensor, Tensor> bwd(const Tensor& dloss, const Tensor& embeddings,
                               const Tensor& references, const Tensor& positive,
                               const Tensor& negative, const Tensor& d_ap, const Tensor& d_an,
                               bool in_batch, bool normalize, bool need_embeddings,
                               bool need_references, const Cost& cost, Distance distance) {
  const int64_t B = embeddings.size(0), D = embeddings.size(1), M = references.size(0);
  const Rows<T> sides(embeddings, references, in_batch, normalize);
  const Tensor &x = sides.x, &r = sides.r;
  const auto* rows = static_cast<const T*>(x.const_data_ptr());
  const auto* others = static_cast<const T*>(r.const_data_ptr());
  const Tensor chosen[] = {positive, negative}, distances[] = {d_ap, d_an};
  const int64_t upstream_stride = dloss.dim() == 0 ? 0 : dloss.stride(0);
  const auto at = [&](int side, int64_t i) {
    return static_cast<const int64_t*>(chosen[side].const_data_ptr())[i * chosen[side].stride(0)];
  };
  const auto distance_at = [&](int side, int64_t i) {
    return static_cast<const T*>(distances[side].const_data_ptr())[i * distances[side].stride(0)];
  };
  const auto contribution = [&](int side, int64_t i) {
    const T by_u = cost.slope(cost.u(distance_at(0, i), distance_at(1, i)));
    // where the hinge is 0, so is the gradient, whatever comes in
    const double dd =
        by_u == 0 ? 0.0 : static_cast<const T*>(dloss.const_data_ptr())[i * upstream_stride] * by_u;
    return Contribution<T>{
        i, static_cast<T>((side == 0 ? dd : -dd) * slope(distance_at(side, i), distance))};
  };
  // The contributions to each chosen row, in the order of their anchors: a fixed order of the sum.
  std::vector<int64_t> begin(M + 1, 0);
  for (int side = 0; side < 2; ++side) {
    for (int64_t i = 0; i < B; ++i) {
      if (at(side, i) >= 0) ++begin[at(side, i) + 1];
    }
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<Contribution<T>> contributions(begin[M]);
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int side = 0; side < 2; ++side) {
    for (int64_t i = 0; i < B; ++i) {
      if (at(side, i) >= 0) contributions[next[at(side, i)]++] = contribution(side, i);
    }
  }
  const auto gradient = [&](const Tensor& given, bool as_anchor, bool as_chosen) {
    const int64_t n = given.size(0);
    const Tensor dx = empty({n, D}, scalar_type_of<T>);
    auto* out = static_cast<T*>(dx.mutable_data_ptr());
    parallel_each(n, 8.0 * D, [&](int64_t i) {
      T* to = out + i * D;
      std::fill_n(to, D, T(0));
      for (int side = 0; as_anchor && side < 2; ++side) {
        if (at(side, i) >= 0)
          loops<T>().add_difference(contribution(side, i).factor, rows + i * D,
                                    others + at(side, i) * D, to, D);
      }
      for (int64_t k = as_chosen ? begin[i] : 0; as_chosen && k < begin[i + 1]; ++k) {
        loops<T>().add_difference(contributions[k].factor, others + i * D,
                                  rows + contributions[k].anchor * D, to, D);
      }
    });
    if (normalize) unit_rows_gradient<T>(given, dx);
    return in_dtype(dx, embeddings.scalar_type());
  };
  return {need_embeddings ? gradient(sides.given_x, true, in_batch)
                          : empty({0}, embeddings.scalar_type()),
          need_references && !in_batch ? gradient(sides.given_r, false, true)
                                       : empty({0}, references.scalar_type())};
}

Results triplet_fwd(Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels,
                    bool in_batch, Optional exclude, bool normalize, std::string positives,
                    std::string negatives, double margin, bool soft, std::string distance) {
  const auto run = embeddings.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(embeddings, labels, references, reference_labels, in_batch, exclude, normalize,
             by_name(kStrategies, positives), by_name(kStrategies, negatives), {margin, soft},
             by_name(pairs::kDistances, distance));
}

std::tuple<Tensor, Tensor> triplet_bwd(Tensor dloss, Tensor embeddings, Tensor references,
                                       Tensor positive, Tensor negative, Tensor d_ap, Tensor d_an,
                                       bool in_batch, bool normalize, bool need_embeddings,
                                       bool need_references, double margin, bool soft,
                                       std::string distance) {
  const auto run = embeddings.scalar_type() == ScalarType::Double ? bwd<double> : bwd<float>;
  return run(dloss, embeddings, references, positive, negative, d_ap, d_an, in_batch, normalize,
             need_embeddings, need_references, {margin, soft},
             by_name(pairs::kDistances, distance));
}

}  // namespace
}  // namespace kdk::triplet

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "triplet_fwd(Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels, "
      "bool in_batch, Tensor? exclude, bool normalize, str positives, str negatives, float margin, "
      "bool soft, str distance) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "triplet_bwd(Tensor dloss, Tensor embeddings, Tensor references, Tensor positive, Tensor "
      "negative, Tensor d_ap, Tensor d_an, bool in_batch, bool normalize, bool need_embeddings, "
      "bool need_references, float margin, bool soft, str distance) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("triplet_fwd", TORCH_BOX(&kdk::triplet::triplet_fwd));
  m.impl("triplet_bwd", TORCH_BOX(&kdk::triplet::triplet_bwd));
}
