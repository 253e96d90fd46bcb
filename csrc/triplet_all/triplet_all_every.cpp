// SPDX-License-Identifier: Apache-2.0
// triplet_all with negatives="all". Each distance d_n to a negative, less the margin, is compared
// with the distances d_p to the positives. The number k_n of positives above it is minus the
// derivative by d_n, and the number w_p of negatives below a positive is the derivative by d_p. The
// hinge losses add up to sum_p w_p d_p - sum_n k_n (d_n - margin), in products that are exact in
// fp64.
#include "triplet_all_cpu.h"
#include "triplet_all_simd.h"

namespace kdk::triplet_all {
namespace {

static_assert(pairs::kMostTile <= kStretch);

constexpr int64_t kFew = 48;  // positives up to which comparing with each beats bisection

template <typename T>
struct Every : Negatives<T> {
  using Negatives<T>::sweep, Negatives<T>::positives, Negatives<T>::ranges;
  const Options& options;
  std::vector<double> slots;     // of each positive of each anchor, see Loops
  std::vector<double> sum;       // of each anchor, likewise
  std::vector<int64_t> nonzero;  // of each anchor
  const Loops<T>& kernels = loops<T>();

  Every(const Sweep<T>& sweep_, const Positives<T>& positives_, const Options& options_)
      : Negatives<T>{sweep_, positives_},
        options(options_),
        slots(positives.offset.back()),
        sum(positives.count.size()),
        nonzero(positives.count.size()) {}

  bool weigh(const Tile<T>& tile) {
    const auto& d = tile.distance;
    bool any = false;
    for (int64_t i = 0; i < d.rows; ++i)
      any |= weigh_row(tile.i0 + i, d.row(i), tile.j0, d.cols, tile.weight.row(i));
    if (!tile.both || positives.none(tile.j0, d.cols)) return any;
    pairs::loops<T>().transpose(d, tile.spare);
    T weight[kStretch];
    bool columns = false;
    for (int64_t j = 0; j < d.cols; ++j) {
      std::fill_n(weight, d.rows, T(0));
      columns |= weigh_row(tile.j0 + j, tile.spare.row(j), tile.i0, d.rows, weight);
      std::copy_n(weight, d.rows, tile.spare.row(j));
    }
    if (columns && sweep.needs_gradient()) pairs::loops<T>().add_transpose(tile.spare, tile.weight);
    return any || columns;
  }

  bool weigh_row(int64_t i, T* d, int64_t j0, int64_t n, T* weight) {
    const int64_t P = positives.count[i], first = positives.offset[i];
    if (P == 0) return false;
    if (options.margin == 0 && !options.soft) settle(i, d, j0, n);
    int64_t found = 0;
    ranges.stretches(false, i, j0, n, [&](int64_t begin, int64_t end) {
      const auto weigh = options.soft ? kernels.soft : P <= kFew ? kernels.few : kernels.many;
      found += weigh(d + begin, static_cast<T>(options.margin), end - begin,
                     positives.distance.data() + first, P, weight + begin, slots.data() + first,
                     &sum[i]);
    });
    nonzero[i] += found;
    return found > 0;
  }

  // Without a margin, rows at equal distances are at the kink of the hinge, and equal rows are
  // found in practice: near a threshold distances are measured again, as those to positives are.
  void settle(int64_t i, T* d, int64_t j0, int64_t n) const {
    const int64_t P = positives.count[i];
    const T* thresholds = positives.distance.data() + positives.offset[i];
    ranges.stretches(false, i, j0, n, [&](int64_t begin, int64_t end) {
      int32_t at[kStretch];
      kernels.not_below(d + begin, end - begin, thresholds, P, at);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t k = at[j - begin];
        const T slack = sweep.slack(i, j0 + j, d[j]);
        if ((k < P && d[j] - thresholds[k] <= slack) ||
            (k > 0 && thresholds[k - 1] - d[j] <= slack))
          d[j] = sweep.from_difference(i, j0 + j);
      }
    });
  }

  // Returns the sum of anchor i, and puts the weights of its positives, times slopes, into the
  // order of the references.
  Sum finish(int64_t i) {
    const int64_t P = positives.count[i], first = positives.offset[i];
    double* w = slots.data() + first;
    Sum result = {options.soft ? sum[i] : -sum[i], options.soft ? nonzero[i] : 0};
    for (int64_t k = P - 2; !options.soft && P > kFew && k >= 0; --k) w[k] += w[k + 1];
    std::vector<double> weight(positives.offset[i + 1] - first);
    for (int64_t k = 0; k < P; ++k) {
      const double d = positives.distance[first + k];
      if (!options.soft) {
        result.total += w[k] * d;
        result.nonzero += static_cast<int64_t>(w[k]);
      }
      weight[positives.position[first + k]] = w[k] * pairs::slope(d, sweep.distance);
    }
    std::copy(weight.begin(), weight.end(), w);
    return result;
  }
};

}  // namespace

template <typename T>
std::tuple<Sum, Tensor, Tensor> with_all(Sweep<T>& sweep, const Positives<T>& positives,
                                         const Options& options) {
  Every<T> loss(sweep, positives, options);
  sweep.run(loss);
  const int64_t B = static_cast<int64_t>(positives.count.size());
  std::vector<Sum> sums(B);
  parallel_each(B, positives.ops(10), [&](int64_t i) { sums[i] = loss.finish(i); });
  Sum sum;
  for (const Sum& each : sums) {
    sum.total += each.total;
    sum.nonzero += each.nonzero;
  }
  const auto nothing = [](int64_t, double*) {};
  auto [dx, dr] =
      gradients(PositiveContributions<T>{sweep, positives, loss.slots}, nothing, nothing);
  return {sum, dx, dr};
}

template std::tuple<Sum, Tensor, Tensor> with_all(Sweep<float>&, const Positives<float>&,
                                                  const Options&);
template std::tuple<Sum, Tensor, Tensor> with_all(Sweep<double>&, const Positives<double>&,
                                                  const Options&);

}  // namespace kdk::triplet_all
