// SPDX-License-Identifier: Apache-2.0
// CPU operator kdkernels_C::triplet_all_fwd. Arguments were checked by the public function.
#include <limits>
#include <string>
#include <tuple>

#include "../common/unit_rows.h"
#include "../pairs/distance_names.h"
#include "triplet_all_cpu.h"

namespace kdk::triplet_all {
namespace {

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fwd(
    const Tensor& embeddings, const Tensor& labels, const Tensor& references,
    const Tensor& reference_labels, bool in_batch, const Optional& exclude, bool normalize,
    bool semihard, const Options& options, pairs::Distance distance, bool need_embeddings,
    bool need_references) {
  const Tensor given_x = contiguous_in_type<T>(embeddings),
               given_r = in_batch ? given_x : contiguous_in_type<T>(references);
  const Tensor x = normalize ? unit_rows<T>(given_x) : given_x, r = in_batch ? x
                                                                    : normalize
                                                                        ? unit_rows<T>(given_r)
                                                                        : given_r;
  Sweep<T> sweep(x, labels, r, reference_labels, in_batch, distance, need_embeddings,
                 need_references, exclude);
  const Positives<T> positives(sweep, semihard);
  auto [sum, dx, dr] =
      semihard ? with_semihard(sweep, positives, options) : with_all(sweep, positives, options);
  if (positives.nan) {
    sum.total = std::numeric_limits<double>::quiet_NaN();
    dx = pairs::nan_gradient(sweep.anchors);
    if (!in_batch) dr = pairs::nan_gradient(sweep.references);
  }
  if (normalize) {
    unit_rows_gradient<T>(given_x, dx);
    unit_rows_gradient<T>(given_r, dr);
  }
  const Tensor total = empty({}, scalar_type_of<T>), nonzero = empty({}, ScalarType::Long),
               valid = empty({}, ScalarType::Long);
  *static_cast<T*>(total.mutable_data_ptr()) = static_cast<T>(sum.total);
  *static_cast<int64_t*>(nonzero.mutable_data_ptr()) = sum.nonzero;
  *static_cast<int64_t*>(valid.mutable_data_ptr()) = positives.triplets;
  return {total, nonzero, valid, dx, dr};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> triplet_all_fwd(
    Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels, bool in_batch,
    Optional exclude, bool normalize, std::string negatives, double margin, bool soft,
    std::string distance, bool need_embeddings, bool need_references) {
  const auto run = embeddings.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(embeddings, labels, references, reference_labels, in_batch, exclude, normalize,
             negatives == "semihard", {margin, soft}, by_name(pairs::kDistances, distance),
             need_embeddings, need_references);
}

}  // namespace
}  // namespace kdk::triplet_all

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "triplet_all_fwd(Tensor embeddings, Tensor labels, Tensor references, Tensor "
      "reference_labels, bool in_batch, Tensor? exclude, bool normalize, str negatives, float "
      "margin, bool soft, "
      "str distance, bool "
      "need_embeddings, bool need_references) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("triplet_all_fwd", TORCH_BOX(&kdk::triplet_all::triplet_all_fwd));
}
