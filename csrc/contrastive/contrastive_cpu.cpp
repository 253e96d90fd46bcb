// SPDX-License-Identifier: Apache-2.0
// CPU operator kdkernels_C::contrastive_fwd. Arguments were checked by the public function.
#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../common/unit_rows.h"
#include "../pairs/distance_names.h"
#include "../pairs/pair_sweep.h"
#include "contrastive_simd.h"

namespace kdk::contrastive {
namespace {

using pairs::Sweep;
using pairs::Tile;

template <typename T>
struct Loss {
  const pairs::LabelRanges& ranges;
  T margin;
  std::vector<double> total;     // of each anchor
  std::vector<int64_t> nonzero;  // likewise
  const Loops<T>& kernels = loops<T>();

  Loss(const pairs::LabelRanges& ranges_, double margin_)
      : ranges(ranges_),
        margin(static_cast<T>(margin_)),
        total(ranges_.first.size()),
        nonzero(ranges_.first.size()) {}

  bool skips(const pairs::Block&) const { return false; }

  // In batch each pair counts once, with the anchor before the reference.
  int64_t begin(int64_t i, int64_t j0, int64_t n) const {
    return ranges.in_batch ? std::clamp<int64_t>(i + 1 - j0, 0, n) : 0;
  }

  template <typename F>
  void stretches(int64_t i, int64_t j0, int64_t n, const F& f) const {
    ranges.compared(i, j0, begin(i, j0, n), n, f);
  }

  bool weigh(const Tile<T>& tile) {
    const int64_t n = tile.distance.cols;
    bool any = false;
    for (int64_t row = 0; row < tile.distance.rows; ++row) {
      const int64_t i = tile.i0 + row, start = begin(i, tile.j0, n);
      const int64_t same = std::clamp(ranges.first[i] - tile.j0, start, n),
                    other = std::clamp(ranges.last[i] - tile.j0, start, n);
      int64_t found = 0;
      const auto add = [&](int64_t first, int64_t last, bool same_label) {
        ranges.compared(i, tile.j0, first, last, [&](int64_t from, int64_t to) {
          found += kernels.losses(tile.distance.row(row) + from, margin, same_label, to - from,
                                  tile.weight.row(row) + from, &total[i]);
        });
      };
      add(start, same, false);
      add(same, other, true);
      add(other, n, false);
      nonzero[i] += found;
      any = any || found > 0;
    }
    return any;
  }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& embeddings, const Tensor& labels,
                                               const Tensor& references,
                                               const Tensor& reference_labels, bool in_batch,
                                               const Optional& exclude, bool normalize,
                                               double margin, pairs::Distance distance,
                                               bool need_embeddings, bool need_references) {
  const Tensor given_x = contiguous_in_type<T>(embeddings),
               given_r = in_batch ? given_x : contiguous_in_type<T>(references);
  const Tensor x = normalize ? unit_rows<T>(given_x) : given_x, r = in_batch ? x
                                                                    : normalize
                                                                        ? unit_rows<T>(given_r)
                                                                        : given_r;
  Sweep<T> sweep(x, labels, r, reference_labels, in_batch, distance, need_embeddings,
                 need_references, exclude);
  Loss<T> loss(sweep.rows.ranges, margin);
  sweep.run(loss);
  const Tensor total = empty({}, scalar_type_of<T>), nonzero = empty({}, ScalarType::Long);
  double sum = 0;
  int64_t count = 0;
  for (size_t i = 0; i < loss.total.size(); ++i) {
    sum += loss.total[i];
    count += loss.nonzero[i];
  }
  *static_cast<T*>(total.mutable_data_ptr()) = static_cast<T>(sum);
  *static_cast<int64_t*>(nonzero.mutable_data_ptr()) = count;
  const auto gradient = [&](const pairs::Side<T>& side) {
    return std::isnan(sum) ? pairs::nan_gradient(side) : side.gradient(0, [](int64_t, double*) {});
  };
  const Tensor dx = gradient(sweep.anchors),
               dr = in_batch ? empty({0}, scalar_type_of<T>) : gradient(sweep.references);
  if (normalize) {
    unit_rows_gradient<T>(given_x, dx);
    unit_rows_gradient<T>(given_r, dr);
  }
  return {total, nonzero, dx, dr};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_fwd(
    Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels, bool in_batch,
    Optional exclude, bool normalize, double margin, std::string distance, bool need_embeddings,
    bool need_references) {
  const auto run = embeddings.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(embeddings, labels, references, reference_labels, in_batch, exclude, normalize, margin,
             by_name(pairs::kDistances, distance), need_embeddings, need_references);
}

}  // namespace
}  // namespace kdk::contrastive

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "contrastive_fwd(Tensor embeddings, Tensor labels, Tensor references, Tensor "
      "reference_labels, bool in_batch, Tensor? exclude, bool normalize, float margin, str "
      "distance, bool "
      "need_embeddings, bool "
      "need_references) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("contrastive_fwd", TORCH_BOX(&kdk::contrastive::contrastive_fwd));
}
