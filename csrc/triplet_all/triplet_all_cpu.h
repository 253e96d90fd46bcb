// SPDX-License-Identifier: Apache-2.0
// Both forms of triplet_all on the CPU share the distances of each anchor to its positives, and how
// their weights contribute to the gradients of the rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "../pairs/pair_sweep.h"

namespace kdk::triplet_all {

using pairs::LabelRanges, pairs::Sweep, pairs::Tile;

struct Options {
  double margin;
  bool soft;
};

struct Sum {
  double total = 0;
  int64_t nonzero = 0;
};

// The positives of all anchors. Those of an anchor that takes part in the sweep have slots
// offset[i]... in the order of the references from ranges.first[i] on, the one that it leaves out
// included; the first count[i] of the same slots hold the lists by distance.
template <typename T>
struct Positives {
  std::vector<int64_t> offset;    // [B + 1]
  std::vector<int64_t> count;     // [B]
  std::vector<T> distance;        // descending
  std::vector<int32_t> position;  // of the positive, from ranges.first[i] on
  int64_t triplets = 0;           // pairs of a positive and a negative, or positives if `chosen`
  bool nan = false;               // whether a triplet has a distance that is not finite

  // `chosen`: each positive meets one negative, which is one that is not finite if there is any.
  Positives(const Sweep<T>& sweep, bool chosen)
      : offset(sweep.rows.ranges.first.size() + 1), count(sweep.rows.ranges.first.size()) {
    const LabelRanges& ranges = sweep.rows.ranges;
    const auto &anchors = sweep.rows.anchors, &references = sweep.rows.references;
    const int64_t B = anchors.size(), M = references.size();
    std::vector<int64_t> broken(M + 1);  // references before j that are not finite
    for (int64_t j = 0; j < M; ++j) broken[j + 1] = broken[j] + !references.finite(j);
    for (int64_t i = 0; i < B; ++i) {
      const int64_t out = ranges.left_out(i);
      const bool out_is_positive = out >= 0 && ranges.same(i, out),
                 out_is_negative = out >= 0 && !out_is_positive,
                 out_is_broken = out >= 0 && !references.finite(out);
      const int64_t size = ranges.last[i] - ranges.first[i], P = size - out_is_positive,
                    N = M - size - out_is_negative;
      offset[i + 1] = offset[i];
      if (P < 1 || N < 1) continue;
      triplets += chosen ? P : P * N;
      nan = nan || !anchors.finite(i) || broken[M] > out_is_broken;
      const int64_t broken_negatives = broken[M] -
                                       (broken[ranges.last[i]] - broken[ranges.first[i]]) -
                                       (out_is_negative && out_is_broken);
      // no other anchor has a triplet with a loss above 0
      if (anchors.finite(i) && !(chosen && broken_negatives > 0)) offset[i + 1] += size;
    }
    distance.resize(offset[B]);
    position.resize(offset[B]);
    measure(sweep);
    sort(ranges);
  }

  bool takes_part(int64_t i) const { return offset[i + 1] > offset[i]; }
  bool none(int64_t i0, int64_t n) const { return offset[i0 + n] == offset[i0]; }
  // Returns the operations that an average anchor takes to visit its positives, at `each`
  // operations for one of them.
  double ops(double each) const { return each * offset.back() / std::max<size_t>(count.size(), 1); }

 private:
  // Whether row i of the n rows of a label measures its distance to row j, and not j that to i: a
  // row measures those to the next half of the others, around the end. So all rows have as much to
  // do, also where nearly all rows have one label.
  static bool measures(int64_t i, int64_t j, int64_t n) {
    const int64_t ahead = 2 * (j > i ? j - i : j - i + n);
    return ahead < n || (ahead == n && i < j);
  }

  void measure(const Sweep<T>& sweep) {
    constexpr T kNone = std::numeric_limits<T>::quiet_NaN();
    const LabelRanges& ranges = sweep.rows.ranges;
    const int64_t B = static_cast<int64_t>(count.size());
    parallel_each(B, ops(4.0 * sweep.rows.anchors.x.cols), [&](int64_t i) {
      if (!takes_part(i)) return;
      const int64_t first = ranges.first[i];
      for (int64_t j = first; j < ranges.last[i]; ++j) {
        T& d = distance[offset[i] + j - first];
        if (!sweep.rows.references.finite(j) || j == ranges.left_out(i)) {
          d = kNone;
        } else if (!ranges.in_batch) {
          d = sweep.from_difference(i, j);
        } else if (measures(i - first, j - first, ranges.last[i] - first)) {
          // a finite row of a label whose rows take part does so too
          d = distance[offset[j] + i - first] = sweep.from_difference(i, j);
        }
      }
    });
  }

  void sort(const LabelRanges& ranges) {
    parallel_each(static_cast<int64_t>(count.size()), ops(20), [&](int64_t i) {
      std::vector<std::pair<T, int32_t>> list;
      list.reserve(offset[i + 1] - offset[i]);
      for (int64_t q = 0; takes_part(i) && q < ranges.last[i] - ranges.first[i]; ++q) {
        const T d = distance[offset[i] + q];
        if (!std::isnan(d)) list.emplace_back(-d, static_cast<int32_t>(q));
      }
      std::sort(list.begin(), list.end());
      count[i] = static_cast<int64_t>(list.size());
      for (size_t k = 0; k < list.size(); ++k) {
        distance[offset[i] + k] = -list[k].first;
        position[offset[i] + k] = list[k].second;
      }
    });
  }
};

// Both forms ask of a tile the distances of anchors to their negatives.
template <typename T>
struct Negatives {
  const Sweep<T>& sweep;
  const Positives<T>& positives;
  const LabelRanges& ranges = sweep.rows.ranges;

  bool skips(const pairs::Block& block) const {
    const auto [i0, rows, j0, cols, diagonal] = block;
    if (positives.none(i0, rows) && (!ranges.in_batch || positives.none(j0, cols))) return true;
    const int64_t last = i0 + rows - 1;  // labels ascend, so those between have the label of both
    return ranges.first[i0] == ranges.first[last] && ranges.last[i0] == ranges.last[last] &&
           ranges.first[i0] <= j0 && ranges.last[i0] >= j0 + cols;
  }

  template <typename F>
  void stretches(int64_t i, int64_t j0, int64_t n, const F& f) const {
    if (ranges.in_batch || positives.takes_part(i)) ranges.stretches(false, i, j0, n, f);
  }
};

// What the distances to positives contribute to the gradients. `weight` has the slots of
// `Positives`, in the order of the references, and holds derivatives times slopes.
template <typename T>
struct PositiveContributions {
  const Sweep<T>& sweep;
  const Positives<T>& positives;
  const std::vector<double>& weight;

  // Subtracts the contributions to anchor i, in batch also those that it gets as a positive.
  void on_anchor(int64_t i, double* sum) const {
    const LabelRanges& ranges = sweep.rows.ranges;
    const int64_t first = ranges.first[i];
    for (int64_t j = first; j < ranges.last[i]; ++j) {
      double factor = positives.takes_part(i) ? weight[positives.offset[i] + j - first] : 0;
      if (ranges.in_batch && positives.takes_part(j))
        factor += weight[positives.offset[j] + i - first];
      add(factor, sweep.anchors.row(i), sweep.references.row(j), sum);
    }
  }

  // Subtracts the contributions to reference j as a positive of anchors [begin, end), which are all
  // anchors of its label.
  void on_reference(int64_t j, int64_t begin, int64_t end, double* sum) const {
    for (int64_t i = begin; i < end; ++i) {
      if (!positives.takes_part(i)) continue;
      const int64_t slot = positives.offset[i] + j - sweep.rows.ranges.first[i];
      add(weight[slot], sweep.references.row(j), sweep.anchors.row(i), sum);
    }
  }

 private:
  void add(double factor, const T* x, const T* y, double* sum) const {
    if (factor != 0)
      sweep.kernels.subtract_difference(factor, x, y, sum, sweep.rows.anchors.x.cols);
  }
};

// Returns both gradients: what the sweep has added up, less what the distances to positives
// contribute, and less what `on_anchor`(i, sum) and `on_reference`(j, sum) subtract from the sum of
// a row.
template <typename T, typename OnAnchor, typename OnReference>
std::pair<Tensor, Tensor> gradients(const PositiveContributions<T>& contributions,
                                    const OnAnchor& on_anchor, const OnReference& on_reference) {
  const Sweep<T>& sweep = contributions.sweep;
  const double ops = contributions.positives.ops(8.0 * sweep.rows.anchors.x.cols);
  const Tensor dx = sweep.anchors.gradient(ops, [&](int64_t i, double* sum) {
    contributions.on_anchor(i, sum);
    on_anchor(i, sum);
  });
  if (sweep.in_batch() || !sweep.references.needed) return {dx, empty({0}, scalar_type_of<T>)};
  const LabelRanges back(sweep.rows.references.label, sweep.rows.anchors.label, false);
  return {dx, sweep.references.gradient(ops, [&](int64_t j, double* sum) {
            contributions.on_reference(j, back.first[j], back.last[j], sum);
            on_reference(j, sum);
          })};
}

// Sweeps with each positive and each negative, and returns the sum and the two gradients.
template <typename T>
std::tuple<Sum, Tensor, Tensor> with_all(Sweep<T>& sweep, const Positives<T>& positives,
                                         const Options& options);

// Does the same with each positive and its semi-hard negative.
template <typename T>
std::tuple<Sum, Tensor, Tensor> with_semihard(Sweep<T>& sweep, const Positives<T>& positives,
                                              const Options& options);

}  // namespace kdk::triplet_all
