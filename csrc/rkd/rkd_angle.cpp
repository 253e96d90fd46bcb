// SPDX-License-Identifier: Apache-2.0
// rkd_angle measures the squared distances of both sides in fp64, sweeps over tiles of pairs as
// seen from every vertex, and makes the gradient from weights on the student's distances.
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "rkd_angle_simd.h"
#include "rkd_cpu.h"
#include "rkd_pairs.h"

namespace kdk::rkd {
namespace {

// A difference of squared distances at a vertex loses as many digits to fp32 as the ratio of its
// distances has; from this ratio on its triples are taken in fp64, at half the speed.
constexpr double kMostUneven = 16;

// Fills in all of the distances.
void measure(Pairs<double>& pairs) {
  pairs.each([&](const Block& block) {
    const auto d = pairs.tile(block, false).distance;
    const auto below = pairs.kept().block(block.j0, block.cols, block.i0, block.rows);
    if (!block.diagonal) {
      pairs::loops<double>().transpose(d, below);
      return;
    }
    for (int64_t i = 0; i < block.rows; ++i) {
      d.row(i)[i] = 0;
      for (int64_t j = 0; j < i; ++j) d.row(i)[j] = d.row(j)[i];
    }
  });
}

// The extent of the distances of one side: the largest square, which is NaN if any distance is, and
// by how much the distances of each row differ.
struct Extent {
  double most = 0;
  std::vector<double> uneven;  // [B] largest over smallest distance that is not 0

  explicit Extent(Matrix<const double> q) : uneven(q.rows) {
    std::vector<double> rows(q.rows);
    parallel_each(q.rows, 4.0 * q.cols, [&](int64_t i) {
      double low = std::numeric_limits<double>::infinity(), high = 0;
      bool nan = false;
      const double* row = q.row(i);
      for (int64_t j = 0; j < q.cols; ++j) {
        nan = nan || std::isnan(row[j]);
        low = row[j] > 0 && row[j] < low ? row[j] : low;
        high = row[j] > high ? row[j] : high;
      }
      rows[i] = nan ? std::numeric_limits<double>::quiet_NaN() : high;
      uneven[i] = std::sqrt(high / low);
    });
    for (const double row : rows) most = std::isnan(row) || row > most ? row : most;
  }
};

// Squared distances in T, scaled so that the largest one is 1, and their inverse roots. Rows are
// `stride` apart.
template <typename T>
class Scaled {
 public:
  Scaled(Matrix<const double> q, double scale, int64_t stride)
      : memory_(2 * q.rows * stride), size_(q.rows * stride) {
    parallel_each(q.rows, 20.0 * stride, [&](int64_t i) {
      T *square = memory_.data() + i * stride, *inverse = square + size_;
      const double* row = q.row(i);
      for (int64_t j = 0; j < q.cols; ++j) {
        const double scaled = row[j] * scale, r = 1 / std::sqrt(scaled);
        square[j] = static_cast<T>(scaled);
        inverse[j] = static_cast<T>(scaled == 0 ? 0 : r);
      }
      std::fill(square + q.cols, square + stride, T(0));
      std::fill(inverse + q.cols, inverse + stride, T(0));
    });
  }
  Sides<T> sides() const { return {memory_.data(), memory_.data() + size_}; }

 private:
  Scratch<T> memory_;
  int64_t size_;
};

// All triples of one call: B vertices, and pairs of B rows.
struct Sweep {
  Matrix<const double> student, teacher;  // squared distances
  double scale_student, scale_teacher;
  Matrix<double> derivative;  // [B, stride] by the scaled ones of the student; null if not needed

  // Returns the sum of the losses over the triples at some vertices, with each pair of rows once.
  template <typename T>
  double run(const std::vector<int64_t>& vertices) const {
    if (vertices.empty()) return 0;
    const int64_t B = student.rows, stride = derivative.cols;
    const Scaled<T> s(student, scale_student, stride), t(teacher, scale_teacher, stride);
    // Small batches are cut finer, so that there are tiles for all cores.
    const int64_t size = std::clamp<int64_t>(round_up(B / 8, kMostLanes), kMostLanes, kAngleBlock);
    const int64_t n = ceil_div(B, size), n_vertices = static_cast<int64_t>(vertices.size());
    std::vector<double> losses(n);
    parallel_pairs(n, 2.0 * size * size * n_vertices, [&](int64_t tj, int64_t tk) {
      const int64_t j0 = tj * size, k0 = tk * size;
      losses[tj] +=
          angles<T>({s.sides(), t.sides(), stride, vertices.data(), n_vertices, j0,
                     std::min(size, B - j0), k0, std::min(size, stride - k0), derivative.data});
    });
    return std::accumulate(losses.begin(), losses.end(), 0.0);
  }
};

// Where a row is at the place of another on one side only, the angle between the two and itself is
// 0 there and 1 on the other side.
double one_sided(Matrix<const double> s, Matrix<const double> t) {
  std::vector<int64_t> found(s.rows);
  parallel_each(s.rows, 2.0 * s.cols, [&](int64_t i) {
    for (int64_t j = 0; j < s.cols; ++j) found[i] += (s.row(i)[j] == 0) != (t.row(i)[j] == 0);
  });
  return 0.5 * static_cast<double>(std::accumulate(found.begin(), found.end(), int64_t{0}));
}

double inverse_of(double most) { return most > 0 ? 1 / most : 1; }

}  // namespace

template <typename T>
Result angle(const Tensor& student, const Tensor& teacher, bool need) {
  const int64_t B = student.size(0), stride = round_up(B, kMostLanes);
  Pairs<double> s(student, pairs::Distance::kSqEuclidean, need, true);
  Pairs<double> t(teacher, pairs::Distance::kSqEuclidean, false, true);
  measure(s);
  measure(t);
  const Extent extent_s(s.kept()), extent_t(t.kept());
  const double sum_of_largest = extent_s.most + extent_t.most;
  if (std::isnan(sum_of_largest)) return {sum_of_largest, s.nan_gradient()};

  const Scratch<double> memory(need ? B * stride : 0);
  const auto derivative = Matrix<double>::contiguous(memory.data(), B, stride);
  parallel_each(need ? B : 0, stride,
                [&](int64_t i) { std::fill_n(derivative.row(i), stride, 0.0); });
  const Sweep sweep{s.kept(), t.kept(), inverse_of(extent_s.most), inverse_of(extent_t.most),
                    derivative};
  std::vector<int64_t> even, uneven;
  for (int64_t i = 0; i < B; ++i) {
    const bool in_fp64 =
        std::is_same_v<T, double> || std::max(extent_s.uneven[i], extent_t.uneven[i]) > kMostUneven;
    (in_fp64 ? uneven : even).push_back(i);
  }
  const double sum = sweep.run<float>(even) + sweep.run<double>(uneven);
  const double scale = B > 0 ? 1 / std::pow(static_cast<double>(B), 3) : 0;
  const double loss = scale * (2 * sum + one_sided(s.kept(), t.kept()));
  if (!need) return {loss, s.gradient()};

  const double factor = 2 * scale * sweep.scale_student;
  s.each([&](const Block& block) {
    const auto tile = s.tile(block, true);
    for (int64_t i = 0; i < block.rows; ++i) {
      double* weight = tile.weight.row(i);
      for (int64_t j = block.begin(i); j < block.cols; ++j) {
        weight[j] = factor * (derivative.row(block.i0 + i)[block.j0 + j] +
                              derivative.row(block.j0 + j)[block.i0 + i]);
      }
    }
    s.add_gradient(block, tile);
  });
  return {loss, s.gradient()};
}

template Result angle<float>(const Tensor&, const Tensor&, bool);
template Result angle<double>(const Tensor&, const Tensor&, bool);

}  // namespace kdk::rkd
