// SPDX-License-Identifier: Apache-2.0
// triplet_all with negatives="semihard". The sweep keeps, per anchor and positive, the nearest
// negative beyond that positive, and per anchor the farthest negative; losses and gradients then
// come from differences of the rows.
#include "../pairs/margin_math.h"
#include "triplet_all_cpu.h"
#include "triplet_all_simd.h"

namespace kdk::triplet_all {
namespace {

using pairs::hinge, pairs::softplus;

static_assert(pairs::kMostTile <= kStretch);

constexpr int64_t kFew = 16;  // positives up to which a pass for each beats bisection

template <typename T>
struct Candidate {
  T key;      // the distance, or minus it where the farthest is looked for
  int64_t j;  // reference in sorted order; -1: none
};

// What the distance of anchor i to reference j contributes to both gradients.
struct Contribution {
  int64_t i, j;
  double factor;
};

template <typename T>
struct Semihard : Negatives<T> {
  using Negatives<T>::sweep, Negatives<T>::positives, Negatives<T>::ranges;
  const std::vector<int64_t>& row = sweep.rows.references.row;
  // One for each positive, in descending order of distance. Where bisection was used, the nearest
  // of a positive is right only after the best of the positives before it has been taken over.
  std::vector<Candidate<T>> nearest;
  std::vector<Candidate<T>> farthest;  // of each anchor

  Semihard(const Sweep<T>& sweep_, const Positives<T>& positives_)
      : Negatives<T>{sweep_, positives_},
        nearest(positives.offset.back(), Candidate<T>{0, -1}),
        farthest(positives.count.size(), Candidate<T>{0, -1}) {}

  void offer(Candidate<T>& best, const Candidate<T>& other) const {
    if (other.j >= 0 && (best.j < 0 || other.key < best.key ||
                         (other.key == best.key && row[other.j] < row[best.j])))
      best = other;
  }

  bool weigh(const Tile<T>& tile) {
    const auto& d = tile.distance;
    for (int64_t i = 0; i < d.rows; ++i) look(tile.i0 + i, d.row(i), tile.j0, d.cols);
    if (tile.both && !positives.none(tile.j0, d.cols)) {
      pairs::loops<T>().transpose(d, tile.spare);
      for (int64_t j = 0; j < d.cols; ++j) look(tile.j0 + j, tile.spare.row(j), tile.i0, d.rows);
    }
    return false;  // weights come when all negatives have been seen
  }

  void look(int64_t i, T* d, int64_t j0, int64_t n) {
    const int64_t P = positives.count[i];
    if (P == 0) return;
    ranges.stretches(false, i, j0, n, [&](int64_t begin, int64_t end) {
      Candidate<T>* best = nearest.data() + positives.offset[i];
      const T* thresholds = positives.distance.data() + positives.offset[i];
      if (P > kFew) {
        bisect(i, best, thresholds, P, d + begin, j0 + begin, end - begin);
      } else {
        for (int64_t k = 0; k < P; ++k)
          beyond(i, best[k], thresholds[k], d + begin, j0 + begin, end - begin);
      }
      constexpr T kLowest = -std::numeric_limits<T>::infinity();
      const T key = least(farthest[i], T(-1), kLowest, d + begin, end - begin);
      for (int64_t j = begin; key < -kLowest && j < end; ++j) {
        if (-d[j] == key) offer(farthest[i], {key, j0 + j});
      }
    });
  }

  // The least sign d_j above `floor`, or infinity if there is none or `best` beats it.
  T least(const Candidate<T>& best, T sign, T floor, const T* d, int64_t n) const {
    const T key = pairs::loops<T>().least_above(d, sign, floor, nullptr, nullptr, n);
    return best.j >= 0 && key > best.key ? std::numeric_limits<T>::infinity() : key;
  }

  // A negative equal to a positive must not be beyond it, so one that is so by no more than what
  // rounding allows is measured again, as the positive was.
  bool doubtful(int64_t i, int64_t j, T d, T threshold) const {
    return d - threshold <= sweep.slack(i, j, d);
  }

  // Offers the nearest negatives beyond one positive.
  void beyond(int64_t i, Candidate<T>& best, T threshold, T* d, int64_t j0, int64_t n) const {
    for (bool settled = false; !settled;) {
      settled = true;
      const T key = least(best, T(1), threshold, d, n);
      if (key == std::numeric_limits<T>::infinity()) return;
      for (int64_t j = 0; j < n; ++j) {
        if (d[j] != key || !doubtful(i, j0 + j, key, threshold)) continue;
        d[j] = sweep.from_difference(i, j0 + j);
        settled = settled && d[j] == key;
      }
      for (int64_t j = 0; settled && j < n; ++j) {
        if (d[j] == key) offer(best, {key, j0 + j});
      }
    }
  }

  // Offers each negative to the farthest positive that it is beyond.
  void bisect(int64_t i, Candidate<T>* best, const T* thresholds, int64_t P, T* d, int64_t j0,
              int64_t n) const {
    int32_t at[kStretch];
    loops<T>().not_below(d, n, thresholds, P, at);
    for (int64_t j = 0; j < n; ++j) {
      int64_t k = at[j];
      if (k == P || (best[k].j >= 0 && d[j] > best[k].key)) continue;
      if (doubtful(i, j0 + j, d[j], thresholds[k])) {
        d[j] = sweep.from_difference(i, j0 + j);
        for (k = 0; k < P && thresholds[k] >= d[j];) ++k;
      }
      if (k < P) offer(best[k], {d[j], j0 + j});
    }
  }
};

template <typename T>
struct Finish {
  const Semihard<T>& search;
  const Options& options;
  const Positives<T>& positives = search.positives;
  std::vector<double> weight;  // of the positives, as PositiveContributions takes it
  // Contributions of the negatives: of anchor i, the first count[i] from positives.offset[i] on.
  std::vector<Contribution> contributions;
  std::vector<int64_t> count;
  std::vector<Sum> sums;  // of each anchor

  Finish(const Semihard<T>& search_, const Options& options_)
      : search(search_),
        options(options_),
        weight(positives.offset.back()),
        contributions(positives.offset.back()),
        count(positives.count.size()),
        sums(positives.count.size()) {}

  void anchor(int64_t i) {
    const Sweep<T>& sweep = search.sweep;
    const int64_t first = positives.offset[i];
    Candidate<T> best{0, -1};
    int64_t negative = -1;
    double d_an = 0;
    Sum sum;
    for (int64_t k = 0; k < positives.count[i]; ++k) {
      search.offer(best, search.nearest[first + k]);  // it is beyond this positive too
      const int64_t j = best.j >= 0 ? best.j : search.farthest[i].j;
      if (j != negative) {
        d_an = sweep.measure(i, j);
        contributions[first + count[i]++] = {i, j, 0.0};
        negative = j;
      }
      const int64_t position = positives.position[first + k];
      const double d_ap = sweep.measure(i, sweep.rows.ranges.first[i] + position);
      const double u = d_ap - d_an + options.margin;
      const auto [loss, slope] = options.soft ? softplus(u) : hinge(u);
      sum.total += loss;
      sum.nonzero += static_cast<T>(loss) > 0;
      weight[first + position] = slope * pairs::slope(d_ap, sweep.distance);
      contributions[first + count[i] - 1].factor -= slope * pairs::slope(d_an, sweep.distance);
    }
    sums[i] = sum;
  }
};

}  // namespace

template <typename T>
std::tuple<Sum, Tensor, Tensor> with_semihard(Sweep<T>& sweep, const Positives<T>& positives,
                                              const Options& options) {
  Semihard<T> search(sweep, positives);
  sweep.run(search);
  const int64_t B = static_cast<int64_t>(positives.count.size()), M = sweep.rows.references.size(),
                D = sweep.rows.anchors.x.cols;
  Finish<T> finish(search, options);
  parallel_each(B, positives.ops(4.0 * D + 100), [&](int64_t i) { finish.anchor(i); });
  Sum sum;
  std::vector<int64_t> begin(M + 1);
  const auto each_contribution = [&](const auto& f) {  // in the order of the anchors
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t k = 0; k < finish.count[i]; ++k)
        f(finish.contributions[positives.offset[i] + k]);
    }
  };
  for (const Sum& each : finish.sums) {
    sum.total += each.total;
    sum.nonzero += each.nonzero;
  }
  each_contribution([&](const Contribution& contribution) { ++begin[contribution.j + 1]; });
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<const Contribution*> of_reference(begin[M]);
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  each_contribution([&](const Contribution& contribution) {
    of_reference[next[contribution.j]++] = &contribution;
  });

  const auto add = [&](double factor, const T* x, const T* y, double* sum) {
    sweep.kernels.subtract_difference(factor, x, y, sum, D);
  };
  const auto on_reference = [&](int64_t j, double* sum) {
    for (int64_t k = begin[j]; k < begin[j + 1]; ++k) {
      const Contribution& contribution = *of_reference[k];
      add(contribution.factor, sweep.references.row(j), sweep.anchors.row(contribution.i), sum);
    }
  };
  const auto on_anchor = [&](int64_t i, double* sum) {
    for (int64_t k = 0; k < finish.count[i]; ++k) {
      const Contribution& contribution = finish.contributions[positives.offset[i] + k];
      add(contribution.factor, sweep.anchors.row(i), sweep.references.row(contribution.j), sum);
    }
    if (sweep.in_batch()) on_reference(i, sum);
  };
  auto [dx, dr] =
      gradients(PositiveContributions<T>{sweep, positives, finish.weight}, on_anchor, on_reference);
  return {sum, dx, dr};
}

template std::tuple<Sum, Tensor, Tensor> with_semihard(Sweep<float>&, const Positives<float>&,
                                                       const Options&);
template std::tuple<Sum, Tensor, Tensor> with_semihard(Sweep<double>&, const Positives<double>&,
                                                       const Options&);

}  // namespace kdk::triplet_all
