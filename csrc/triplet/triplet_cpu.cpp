// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::triplet_{fwd,bwd}. Arguments were checked by the public function.
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../pairs/distance_names.h"
#include "triplet_mine.h"

namespace kdk::triplet {
namespace {

using pairs::Distance, pairs::from_squared, pairs::slope;

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& embeddings, const Tensor& labels,
                                               const Tensor& references,
                                               const Tensor& reference_labels, bool in_batch,
                                               const Optional& exclude, Strategy positives,
                                               Strategy negatives, Distance distance) {
  const int64_t B = embeddings.size(0), D = embeddings.size(1);
  const Tensor positive = empty({B}, ScalarType::Long), negative = empty({B}, ScalarType::Long);
  const Tensor d_ap = empty({B}, scalar_type_of<T>), d_an = empty({B}, scalar_type_of<T>);
  const Tensor x = contiguous_in_type<T>(embeddings),
               r = in_batch ? x : contiguous_in_type<T>(references);
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
    static_cast<int64_t*>(positive.mutable_data_ptr())[row] = valid ? p.best[i].row : -1;
    static_cast<int64_t*>(negative.mutable_data_ptr())[row] = valid ? n.best[i].row : -1;
    static_cast<T*>(d_ap.mutable_data_ptr())[row] = from_difference(p.best[i]);
    static_cast<T*>(d_an.mutable_data_ptr())[row] = from_difference(n.best[i]);
  });
  return {positive, negative, d_ap, d_an};
}

// What an anchor and a row that it chose contribute to the gradients of both.
template <typename T>
struct Contribution {
  int64_t anchor;
  T factor;  // of (anchor - row) in the gradient of the anchor
};

template <typename T>
std::tuple<Tensor, Tensor> bwd(const Tensor& dd_ap, const Tensor& dd_an, const Tensor& embeddings,
                               const Tensor& references, const Tensor& positive,
                               const Tensor& negative, const Tensor& d_ap, const Tensor& d_an,
                               bool in_batch, bool need_embeddings, bool need_references,
                               Distance distance) {
  const int64_t B = embeddings.size(0), D = embeddings.size(1), M = references.size(0);
  const Tensor x = contiguous_in_type<T>(embeddings),
               r = in_batch ? x : contiguous_in_type<T>(references);
  const auto* rows = static_cast<const T*>(x.const_data_ptr());
  const auto* others = static_cast<const T*>(r.const_data_ptr());
  const Tensor chosen[] = {positive, negative}, distances[] = {d_ap, d_an},
               upstream[] = {dd_ap, dd_an};
  const auto at = [&](int side, int64_t i) {
    return static_cast<const int64_t*>(chosen[side].const_data_ptr())[i * chosen[side].stride(0)];
  };
  const auto contribution = [&](int side, int64_t i) {
    const double d =
        static_cast<const T*>(distances[side].const_data_ptr())[i * distances[side].stride(0)];
    const double dd =
        static_cast<const T*>(upstream[side].const_data_ptr())[i * upstream[side].stride(0)];
    return Contribution<T>{i, static_cast<T>(dd * slope(d, distance))};
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
  const auto gradient = [&](int64_t n, bool as_anchor, bool as_chosen) {
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
    return in_dtype(dx, embeddings.scalar_type());
  };
  return {need_embeddings ? gradient(B, true, in_batch) : empty({0}, embeddings.scalar_type()),
          need_references && !in_batch ? gradient(M, false, true)
                                       : empty({0}, references.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> triplet_fwd(Tensor embeddings, Tensor labels,
                                                       Tensor references, Tensor reference_labels,
                                                       bool in_batch, Optional exclude,
                                                       std::string positives, std::string negatives,
                                                       std::string distance) {
  const auto run = embeddings.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(embeddings, labels, references, reference_labels, in_batch, exclude,
             by_name(kStrategies, positives), by_name(kStrategies, negatives),
             by_name(pairs::kDistances, distance));
}

std::tuple<Tensor, Tensor> triplet_bwd(Tensor dd_ap, Tensor dd_an, Tensor embeddings,
                                       Tensor references, Tensor positive, Tensor negative,
                                       Tensor d_ap, Tensor d_an, bool in_batch,
                                       bool need_embeddings, bool need_references,
                                       std::string distance) {
  const auto run = embeddings.scalar_type() == ScalarType::Double ? bwd<double> : bwd<float>;
  return run(dd_ap, dd_an, embeddings, references, positive, negative, d_ap, d_an, in_batch,
             need_embeddings, need_references, by_name(pairs::kDistances, distance));
}

}  // namespace
}  // namespace kdk::triplet

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "triplet_fwd(Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels, "
      "bool in_batch, Tensor? exclude, "
      "str positives, str negatives, str distance) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "triplet_bwd(Tensor dd_ap, Tensor dd_an, Tensor embeddings, Tensor references, Tensor "
      "positive, Tensor negative, "
      "Tensor d_ap, Tensor d_an, bool in_batch, bool need_embeddings, bool need_references, str "
      "distance) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("triplet_fwd", TORCH_BOX(&kdk::triplet::triplet_fwd));
  m.impl("triplet_bwd", TORCH_BOX(&kdk::triplet::triplet_bwd));
}
