// SPDX-License-Identifier: Apache-2.0
// rkd_distance takes three sweeps over tiles of the distances of both sides: for their means, the
// loss, and the gradient. Each sweep needs a number that the one before has found: the gradient
// through the mean is the same for all pairs. Distances are kept between sweeps where they take no
// more memory than the features. Else they are measured again, which costs half a product, where
// the gradient costs a whole product in any case.
#include <cmath>
#include <numeric>
#include <vector>

#include "rkd_cpu.h"
#include "rkd_pairs.h"
#include "rkd_simd.h"

namespace kdk::rkd {
namespace {

double total(const std::vector<double>& rows) {
  return std::accumulate(rows.begin(), rows.end(), 0.0);
}

}  // namespace

template <typename T>
Result distance(const Tensor& student, const Tensor& teacher, bool need) {
  const int64_t B = student.size(0);
  const bool keep = B <= student.size(1) + teacher.size(1);
  Pairs<T> s(student, pairs::Distance::kEuclidean, need, keep);
  Pairs<T> t(teacher, pairs::Distance::kEuclidean, false, keep);
  const Loops<T>& kernels = loops<T>();
  // f(row, begin of its part above the diagonal, tiles) for each row of a block
  const auto each_row = [](const Block& block, const auto& f) {
    for (int64_t i = 0; i < block.rows; ++i) {
      if (block.begin(i) < block.cols) f(i, block.begin(i));
    }
  };

  std::vector<double> sums_s(B), sums_t(B);
  s.each([&](const Block& block) {
    const auto tile_s = s.tile(block, false), tile_t = t.tile(block, false);
    each_row(block, [&](int64_t i, int64_t begin) {
      sums_s[block.i0 + i] += kernels.sum(tile_s.distance.row(i) + begin, block.cols - begin);
      sums_t[block.i0 + i] += kernels.sum(tile_t.distance.row(i) + begin, block.cols - begin);
    });
  });
  const double pairs = 0.5 * B * (B - 1);
  const auto inverse_mean = [pairs](const std::vector<double>& sums) {
    const double sum = total(sums);
    return sum == 0 ? 0.0 : pairs / sum;
  };
  const double inverse_s = inverse_mean(sums_s), inverse_t = inverse_mean(sums_t);
  const auto compared = [&](const auto& tile_s, const auto& tile_t, const Block& block, int64_t i) {
    const int64_t begin = block.begin(i);
    return Compared<T>{tile_s.distance.row(i) + begin, tile_t.distance.row(i) + begin,
                       block.cols - begin, static_cast<T>(inverse_s), static_cast<T>(inverse_t)};
  };

  std::vector<double> losses(B), products(B);
  s.each([&](const Block& block) {
    const auto tile_s = s.tile(block, true), tile_t = t.tile(block, true);
    each_row(block, [&](int64_t i, int64_t) {
      kernels.compare(compared(tile_s, tile_t, block, i), &losses[block.i0 + i],
                      &products[block.i0 + i]);
    });
  });
  // each pair stands for two, and the diagonal is 0
  const double scale = B > 0 ? 2 / (static_cast<double>(B) * B) : 0, loss = scale * total(losses);
  if (!need || std::isnan(loss)) return {loss, s.nan_gradient()};

  const T shared = static_cast<T>(pairs > 0 ? total(products) / pairs : 0);
  const T factor = static_cast<T>(scale * inverse_s);
  s.each([&](const Block& block) {
    const auto tile_s = s.tile(block, true), tile_t = t.tile(block, true);
    each_row(block, [&](int64_t i, int64_t begin) {
      kernels.weigh(compared(tile_s, tile_t, block, i), shared, factor,
                    tile_s.weight.row(i) + begin);
    });
    s.add_gradient(block, tile_s);
  });
  return {loss, s.gradient()};
}

template Result distance<float>(const Tensor&, const Tensor&, bool);
template Result distance<double>(const Tensor&, const Tensor&, bool);

}  // namespace kdk::rkd
