// SPDX-License-Identifier: Apache-2.0
// CUDA operators kdkernels_cuda::triplet_{fwd,gradient}. The launchers in kdkernels/cuda/triplet.py
// sort; other arguments were checked by the public function.
#include "triplet_cuda.h"

#include <string>
#include <tuple>

#include "../common/cuda/glue.h"
#include "../pairs/distance_names.h"
#include "triplet_names.h"

namespace kdk::triplet {
namespace {

using namespace kdk::cuda;

// Rows in the order of their labels, and memory for them as products take them.
struct Side {
  std::optional<Tensor> moved;
  SortedRows rows;

  Side(const Device& device, const Tensor& x, const Tensor& label, const Tensor& order, float* norm,
       bool moves)
      : rows{source_of(x), source_of(x), data_of<const int64_t>(label),
             data_of<const int64_t>(order), norm} {
    if (!moves) return;
    moved = device.empty({x.size(0), round_up(x.size(1), 4)}, ScalarType::Float);
    rows.x = source_of(*moved);
    rows.x.cols = x.size(1);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> triplet_fwd(
    Tensor embeddings,        // [B, D] in the order of `labels`
    Tensor labels,            // [B] int64, sorted
    Tensor order,             // [B] int64, where those were
    Tensor references,        // [M, D] in the caller's order
    Tensor sorted,            // [M, D] in the order of their labels
    Tensor reference_labels,  // [M] int64, sorted
    Tensor reference_order,   // [M] int64
    bool in_batch,
    Optional exclude,  // [B] int64, in the caller's order
    std::string positives, std::string negatives, std::string distance, bool ieee) {
  const Device device(embeddings);
  const int64_t B = embeddings.size(0), M = references.size(0);
  const Tensor positive = device.empty({B}, ScalarType::Long),
               negative = device.empty({B}, ScalarType::Long);
  const Tensor d_ap = device.empty({B}, ScalarType::Float),
               d_an = device.empty({B}, ScalarType::Float);
  const Math math = math_of(embeddings, ieee);
  const Tensor x = with_contiguous_rows(embeddings), r = with_contiguous_rows(sorted),
               unsorted = with_contiguous_rows(references);
  const Tensor winners = device.empty({2, B}, ScalarType::Long);
  const Tensor norms = device.empty({B + M}, ScalarType::Float);
  Winner* const winner[2] = {data_of<Winner>(winners), data_of<Winner>(winners) + B};
  const Optional point = point_of(device, in_batch ? x : r);
  const Side side(device, x, labels, order, data_of<float>(norms), point.has_value());
  std::optional<Side> others;
  if (!in_batch)
    others.emplace(device, r, reference_labels, reference_order, data_of<float>(norms) + B,
                   point.has_value());
  const SortedRows &anchors = side.rows, &candidates = others ? others->rows : side.rows;
  const Strategy p = by_name(kStrategies, positives), n = by_name(kStrategies, negatives);
  const bool paired = p == Strategy::kPaired, bounded = n == Strategy::kSemihard;
  const float* const moved_by = point ? data_of<const float>(*point) : nullptr;
  PrepareParams prepare{anchors, {winner[0], winner[1]}, {}, moved_by};
  if (paired) prepare.paired = source_of(unsorted);
  launch_triplet_prepare(prepare, math, device.stream());
  if (!in_batch)
    launch_triplet_prepare({candidates, {nullptr, nullptr}, {}, moved_by}, math, device.stream());

  const Optional left_out = contiguous(exclude);
  // a semi-hard positive is the farthest within its bound, a semi-hard negative the nearest beyond
  const int sign[2] = {p == Strategy::kEasiest ? 1 : -1, n == Strategy::kEasiest ? -1 : 1};
  const auto mine = [&](int positive_sign, int negative_sign, int bound) {
    MineParams params{anchors,
                      candidates,
                      in_batch,
                      close_share(math, x.size(1)),
                      {positive_sign, negative_sign},
                      {winner[0], winner[1]},
                      bound,
                      0,
                      left_out ? data_of<const int64_t>(*left_out) : nullptr};
    if (bound >= 0) params.bound_sign = sign[bound];
    launch_triplet_mine(params, math, device.stream());
  };
  if (paired) {
    mine(0, sign[1], bounded ? 0 : -1);
  } else if (bounded) {
    mine(sign[0], 0, -1);
    mine(0, sign[1], 0);
  } else if (p == Strategy::kSemihard) {
    mine(0, sign[1], -1);
    mine(sign[0], 0, 1);
  } else {
    mine(sign[0], sign[1], -1);
  }
  launch_triplet_distances({anchors,
                            source_of(unsorted),
                            {winner[0], winner[1]},
                            by_name(pairs::kDistances, distance),
                            data_of<int64_t>(positive),
                            data_of<int64_t>(negative),
                            data_of<float>(d_ap),
                            data_of<float>(d_an)},
                           math, device.stream());
  return {positive, negative, d_ap, d_an};
}

// The gradient of anchors, or of references, or of both where they are the same.
Tensor triplet_gradient(Tensor dd,          // [2 B] fp32
                        Tensor embeddings,  // [B, D]
                        Tensor references,  // [M, D]
                        Tensor chosen,      // [2 B] int64
                        Tensor d,           // [2 B] fp32
                        Tensor order,       // [2 B] int64, or empty if not `as_chosen`
                        Tensor begin,       // [M + 1] int64, or empty
                        bool as_anchor, bool as_chosen, std::string distance) {
  const Device device(embeddings);
  const Tensor x = with_contiguous_rows(embeddings), r = with_contiguous_rows(references);
  const int64_t N = as_anchor ? x.size(0) : r.size(0);
  const Tensor out = device.empty({N, x.size(1)}, embeddings.scalar_type());
  if (out.numel() == 0) return out;
  launch_triplet_gradient(
      {source_of(x), source_of(r), data_of<const int64_t>(chosen), data_of<const float>(d),
       data_of<const float>(dd), data_of<const int64_t>(order), data_of<const int64_t>(begin),
       out.mutable_data_ptr(), N, as_anchor, as_chosen, by_name(pairs::kDistances, distance)},
      math_of(embeddings, true), device.stream());
  return out;
}

}  // namespace
}  // namespace kdk::triplet

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_cuda, m) {
  m.def(
      "triplet_fwd(Tensor embeddings, Tensor labels, Tensor order, Tensor references, Tensor "
      "sorted, "
      "Tensor reference_labels, Tensor reference_order, bool in_batch, Tensor? exclude, str "
      "positives, str "
      "negatives, "
      "str "
      "distance, bool ieee) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "triplet_gradient(Tensor dd, Tensor embeddings, Tensor references, Tensor chosen, Tensor d, "
      "Tensor "
      "order, Tensor begin, bool as_anchor, bool as_chosen, str distance) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda, KDK_CUDA_DISPATCH_KEY, m) {
  m.impl("triplet_fwd", TORCH_BOX(&kdk::triplet::triplet_fwd));
  m.impl("triplet_gradient", TORCH_BOX(&kdk::triplet::triplet_gradient));
}
