// SPDX-License-Identifier: Apache-2.0
// CUDA operator kdkernels_cuda::triplet_all_fwd. The launcher in kdkernels/cuda/triplet_all.py
// sorts labels; other arguments were checked by the public function.
#include "triplet_all_cuda.h"

#include <string>
#include <tuple>

#include "../common/cuda/glue.h"
#include "../pairs/distance_names.h"

namespace kdk::triplet_all {
namespace {

using namespace kdk::cuda;

// The rows of one side in the order of their labels, and the memory for them.
class Side {
 public:
  Side(const Device& device, const Tensor& features, const Tensor& label, const Tensor& order,
       bool needed)
      : needed_(needed),
        features_(with_contiguous_rows(features)),
        label_(label),
        order_(order),
        place_(device.empty({size()}, ScalarType::Long)),
        // rows of whole 16-byte pieces, whatever D
        x_(device.empty({size(), round_up(columns(), 4)}, ScalarType::Float)),
        given_(device.empty({size(), x_.size(1)}, ScalarType::Float)),
        norm_(device.empty({size()}, ScalarType::Float)),
        sums_(device.empty({needed ? size() : 0}, ScalarType::Double)),
        weighted_(device.empty({needed ? size() : 0, columns()}, ScalarType::Float)) {
    rows = {source_of(x_),
            source_of(given_),
            data_of<float>(norm_),
            data_of<const int64_t>(order_),
            needed ? data_of<double>(sums_) : nullptr,
            needed ? data_of<float>(weighted_) : nullptr};
    rows.x.cols = rows.given.cols = columns();
    rows.x.stride = rows.given.stride = x_.size(1);
  }

  int64_t size() const { return features_.size(0); }
  int64_t columns() const { return features_.size(1); }
  bool needed() const { return needed_; }
  const int64_t* place() const { return data_of<const int64_t>(place_); }

  // Returns a point that the rows lie around, [D].
  Tensor point(const Device& device) const {
    const Tensor point = device.empty({columns()}, ScalarType::Float);
    if (columns() > 0)
      launch_centre({source_of(features_), data_of<float>(point), 1}, math_of(features_, true),
                    device.stream());
    return point;
  }

  // Where `ranges` is given, these are anchors, and the references of their labels go there.
  void prepare(const Device& device, const Side& references, const Tensor& point,
               int64_t* ranges) const {
    launch_triplet_all_prepare(
        {rows, source_of(features_), data_of<const float>(point), data_of<int64_t>(place_),
         data_of<const int64_t>(label_), data_of<const int64_t>(references.label_),
         references.size(), ranges, ranges ? ranges + size() : nullptr},
        math_of(features_, true), device.stream());
  }

  Rows chunk(int64_t first, int64_t count) const {
    Rows some = rows;
    some.x = rows_of(rows.x, first, count, Math::kIeee);
    some.given = rows_of(rows.given, first, count, Math::kIeee);
    some.norm += first;
    some.order += first;
    if (!needed_) return some;
    some.sums += first;
    some.weighted += first * columns();
    return some;
  }

  Tensor gradient(const Device& device) const {
    if (!needed_) return device.empty({0}, ScalarType::Float);
    const Tensor dx = device.empty({size(), columns()}, ScalarType::Float);
    if (dx.numel() > 0) launch_triplet_all_gradient({rows, data_of<float>(dx)}, device.stream());
    return dx;
  }

  Rows rows{};

 private:
  bool needed_;
  Tensor features_, label_, order_, place_, x_, given_, norm_, sums_, weighted_;
};

// Makes the losses and weights of a chunk, and the two products that add up what the weights
// contribute.
void weigh(const Device& device, WeighParams params, const Tensor& weights, Math math) {
  const Rows &anchors = params.chunk.anchors, &references = params.chunk.references;
  const int64_t R = anchors.x.rows, M = references.x.rows, D = anchors.x.cols;
  std::optional<Product> products[2];
  for (int side = 0; side < 2; ++side) {
    const Rows &rows = side == 0 ? anchors : references, &other = side == 0 ? references : anchors;
    if (rows.weighted == nullptr || D == 0) continue;
    ProductParams& product =
        products[side].emplace(device, 1, rows.x.rows, D, other.x.rows, math).params;
    product.a = source_of(weights);
    product.a.rows = R;
    product.a.cols = M;
    product.b = other.x;
    product.out = rows.weighted;
    product.add = rows.weighted;
    params.semaphores[side] = product.semaphores;
    params.semaphore_count[side] = products[side]->semaphore_count();
  }
  launch_triplet_all_weigh(params, device.stream());
  for (int side = 0; side < 2; ++side) {
    if (!products[side]) continue;
    launch_triplet_all_close({params.chunk, params.weights, side == 1}, device.stream());
    products[side]->launch(side == 0 ? Along::kContraction : Along::kOutput, device);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> triplet_all_fwd(
    Tensor embeddings,        // [B, D]
    Tensor labels,            // [B] int64, sorted
    Tensor order,             // [B] int64, which rows those are of
    Tensor references,        // [M, D]
    Tensor reference_labels,  // [M] int64, sorted
    Tensor reference_order,   // [M] int64
    bool in_batch,
    Optional exclude,  // [B] int64, sorted references of sorted anchors
    std::string negatives, double margin, bool soft, std::string distance, bool need_embeddings,
    bool need_references, bool ieee) {
  const Device device(embeddings);
  const int64_t B = embeddings.size(0), M = references.size(0);
  if (B == 0 || M == 0) {
    const auto nothing = [&](bool need, const Tensor& x) {
      return need ? device.zeros({x.size(0), x.size(1)}, ScalarType::Float)
                  : device.empty({0}, ScalarType::Float);
    };
    return {device.zeros({}, ScalarType::Float), device.zeros({}, ScalarType::Long),
            device.zeros({}, ScalarType::Long), nothing(need_embeddings, embeddings),
            nothing(need_references && !in_batch, references)};
  }
  // features of 16 bits are tf32 numbers
  const Math math =
      ieee && embeddings.scalar_type() == ScalarType::Float ? Math::kIeee : Math::kTf32x3;
  const Side anchors(device, embeddings, labels, order, need_embeddings);
  std::optional<Side> others;
  if (!in_batch)
    others.emplace(device, references, reference_labels, reference_order, need_references);
  const Side& candidates = in_batch ? anchors : *others;
  const Tensor ranges = device.empty({2, B}, ScalarType::Long);
  const Tensor point = candidates.point(device);
  if (!in_batch) candidates.prepare(device, candidates, point, nullptr);
  anchors.prepare(device, candidates, point, data_of<int64_t>(ranges));

  const bool gradient = anchors.needed() || candidates.needed();
  const int64_t stride = round_up(M, 4);
  const int64_t step = rows_in_l2(B, stride * (gradient ? 2 : 1) * sizeof(float));
  const Tensor d = device.empty({step, stride}, ScalarType::Float);
  const Tensor weights = device.empty({gradient ? step : 0, stride}, ScalarType::Float);
  const Tensor close = device.empty({ceil_div(step, kTile), ceil_div(M, kTile)}, ScalarType::Int);
  const Tensor losses = device.empty({B}, ScalarType::Double),
               nonzero = device.empty({B}, ScalarType::Long),
               triplets = device.empty({B}, ScalarType::Long);
  WeighParams params{};
  params.begin = data_of<const int64_t>(ranges);
  params.end = params.begin + B;
  params.exclude = exclude ? data_of<const int64_t>(*exclude) : nullptr;
  params.place = candidates.place();
  params.form = negatives == "semihard" ? (soft ? Form::kSoftSemihard : Form::kSemihard)
                                        : (soft ? Form::kSoftplus : Form::kHinge);
  params.margin = static_cast<float>(margin);
  params.weights = gradient ? data_of<float>(weights) : nullptr;
  params.losses = data_of<double>(losses);
  params.nonzero = data_of<int64_t>(nonzero);
  params.triplets = data_of<int64_t>(triplets);
  for (int64_t first = 0; first < B; first += step) {
    params.chunk = {anchors.chunk(first, std::min(step, B - first)),
                    candidates.rows,
                    in_batch,
                    first,
                    by_name(pairs::kDistances, distance),
                    data_of<float>(d),
                    stride,
                    data_of<int>(close)};
    launch_triplet_all_distances(params.chunk, math, device.stream());
    weigh(device, params, weights, math);
  }
  const Tensor total = device.empty({}, ScalarType::Float),
               nonzero_total = device.empty({}, ScalarType::Long),
               triplets_total = device.empty({}, ScalarType::Long);
  launch_triplet_all_totals(
      {params.losses, params.nonzero, params.triplets, B, data_of<float>(total),
       data_of<int64_t>(nonzero_total), data_of<int64_t>(triplets_total)},
      device.stream());
  return {total, nonzero_total, triplets_total, anchors.gradient(device),
          in_batch ? device.empty({0}, ScalarType::Float) : candidates.gradient(device)};
}

}  // namespace
}  // namespace kdk::triplet_all

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_cuda, m) {
  m.def(
      "triplet_all_fwd(Tensor embeddings, Tensor labels, Tensor order, Tensor references, Tensor "
      "reference_labels, Tensor reference_order, bool in_batch, Tensor? exclude, str negatives, "
      "float margin, bool "
      "soft, "
      "str distance, bool need_embeddings, bool need_references, bool ieee) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda, KDK_CUDA_DISPATCH_KEY, m) {
  m.impl("triplet_all_fwd", TORCH_BOX(&kdk::triplet_all::triplet_all_fwd));
}
