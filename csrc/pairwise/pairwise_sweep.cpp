// SPDX-License-Identifier: Apache-2.0
// The forward makes tiles of values. The backward turns tiles of the incoming gradient into
// weights, and adds up what they contribute to the gradients of the rows.
//
// With w_ij the incoming gradient times the slope of the value, the gradient of a row is sum_j w_ij
// y_j for products, and (sum_j w_ij) x_i - sum_j w_ij y_j for distances. In batch, only tiles on
// and above the diagonal are visited, with the incoming gradient of both halves, and each tile
// serves its rows and its columns.
#include <algorithm>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "../pairs/pair_sweep_simd.h"
#include "../pairs/tile_grid.h"
#include "pairwise_cpu.h"
#include "pairwise_simd.h"

namespace kdk::pairwise {
namespace {

using pairs::Block, pairs::Distance, pairs::TileGrid;

// to = from, or to += from. to: columns contiguous
template <typename T>
void move(Matrix<const T> from, Matrix<T> to, bool add) {
  const auto& kernels = pairs::loops<T>();
  if (from.row_stride == 1 && from.col_stride != 1) {
    add ? kernels.add_transpose(from.t(), to) : kernels.transpose(from.t(), to);
    return;
  }
  const auto row = [&](const T* x, T* y, int64_t stride) {
    if (add) {
      for (int64_t j = 0; j < from.cols; ++j) y[j] += x[j * stride];
    } else {
      for (int64_t j = 0; j < from.cols; ++j) y[j] = x[j * stride];
    }
  };
  for (int64_t i = 0; i < from.rows; ++i) {
    if (from.col_stride == 1) {
      row(from.row(i), to.row(i), 1);
    } else if (from.col_stride == 0) {  // expanded, as the gradient of a sum is
      row(from.row(i), to.row(i), 0);
    } else {
      row(from.row(i), to.row(i), from.col_stride);
    }
  }
}

template <typename T>
struct Forward {
  const Pair<T>& pair;
  T gamma;
  Distance distance =
      pair.metric == Metric::kEuclidean ? Distance::kEuclidean : Distance::kSqEuclidean;
  T largest_norm = pair.metric == Metric::kRbf ? largest(pair.other().norm) : T(0);

  static T largest(const std::vector<T>& norms) {
    T most = 0;
    for (const T norm : norms) most = std::max(most, norm);  // which passes NaN by
    return most;
  }

  // Turns products of rows i0... and j0... into values; in a tile on the diagonal, only those above
  // the diagonal.
  void values(Matrix<T> tile, int64_t i0, int64_t j0) const {
    const Rows<T>&x = pair.x, &y = pair.other();
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t begin = pair.in_batch() && i0 == j0 ? i : 0, n = tile.cols - begin;
      T* row = tile.row(i) + begin;
      const T norm = x.norm[i0 + i], *norms = y.norm.data() + j0 + begin;
      int64_t close = pairs::loops<T>().distances(row, norm, norms, n, distance);
      if (pair.metric == Metric::kRbf && is_sharp(T(0), norm + largest_norm, gamma))
        close += loops<T>().mark_sharp(row, norm, norms, gamma, n);
      for (int64_t j = 0; close > 0 && j < n; ++j) {
        if (row[j] < 0) row[j] = from_difference(i0 + i, j0 + begin + j);
      }
      if (pair.metric == Metric::kRbf) loops<T>().rbf(row, gamma, n);
    }
  }

  // Returns the distance that the difference of the rows gives, as the caller gave them.
  T from_difference(int64_t i, int64_t j) const {
    const Matrix<const T>&x = pair.x.given, &y = pair.other().given;
    if (pair.in_batch() && i == j) return T(0);
    const double d2 = rows::loops<T>().squared_difference(x.row(i), y.row(j), x.cols);
    return static_cast<T>(pairs::from_squared(d2, distance));
  }
};

// Fills in the values below the diagonal from those above it.
template <typename T>
void mirror(Matrix<T> tile) {
  constexpr int64_t kBlock = 16;
  for (int64_t i0 = 0; i0 < tile.rows; i0 += kBlock) {
    const int64_t n = std::min(kBlock, tile.rows - i0);
    if (i0 > 0) pairs::loops<T>().transpose(tile.block(0, i0, i0, n), tile.block(i0, n, 0, i0));
    for (int64_t i = i0; i < i0 + n; ++i) {
      for (int64_t j = i0; j < i; ++j) tile.row(i)[j] = tile.row(j)[i];
    }
  }
}

// What the sweep adds up for the gradient of one side.
template <typename T>
struct Gradient {
  const Rows<T>& rows;
  const Matrix<T>* sum;       // [n, D], where the gradient will be; null if not needed
  std::vector<double> total;  // [n], distances only: sum of the weights
  std::vector<T> bound;       // [n], distances only: see is_close

  Gradient(const Rows<T>& rows_, const Matrix<T>* sum_, Metric metric, double gamma)
      : rows(rows_), sum(sum_), total(rows_.norm.size()), bound(rows_.norm) {
    for (T& x : bound) x = close_bound(metric, x, gamma);
    if (sum == nullptr) return;
    for (int64_t i = 0; i < sum->rows; ++i) std::fill_n(sum->row(i), sum->cols, T(0));
  }

  void add(Matrix<const T> weight, const Rows<T>& others, int64_t i0, int64_t j0) const {
    if (sum == nullptr) return;
    gemm<T>(weight, others.x.row_block(j0, weight.cols), sum->row_block(i0, weight.rows), 1);
  }

  // The difference of close rows would be lost between the two terms of a gradient.
  void add_close(double factor, int64_t i, const T* other) const {
    if (sum != nullptr)
      loops<T>().subtract_difference(factor, rows.given.row(i), other, sum->row(i), sum->cols);
  }

  void finish(Metric metric) const {
    if (sum == nullptr || metric == Metric::kDot) return;
    parallel_each(sum->rows, 8.0 * sum->cols, [&](int64_t i) {
      if (metric == Metric::kCosine) {
        kdk::rows::loops<T>().normalize_backward(rows.given.row(i), sum->row(i), sum->cols);
      } else {
        loops<T>().finish(total[i], rows.x.row(i), sum->row(i), sum->cols);
      }
    });
  }
};

template <typename T>
struct Backward {
  Metric metric;
  double gamma;
  bool in_batch;
  Gradient<T>&x, &y;  // one and the same in batch

  // Turns the incoming gradients of a tile into weights. The contributions of close pairs are added
  // at once.
  void weigh(Matrix<T> weight, Matrix<const T> value, int64_t i0, int64_t j0,
             double* column_sums) const {
    const T factor = static_cast<T>(-2 * gamma);
    std::fill_n(column_sums, weight.cols, 0.0);
    const bool diagonal = in_batch && i0 == j0;
    for (int64_t i = 0; i < weight.rows; ++i) {
      if (diagonal) weight.row(i)[i] = 0;
      const int64_t close =
          loops<T>().close(value.row(i), x.bound[i0 + i], y.bound.data() + j0, metric, weight.cols);
      if (close > (diagonal ? 1 : 0)) carry_close(weight, value, i, i0, j0);  // itself is close
      x.total[i0 + i] +=
          loops<T>().slopes(value.row(i), weight.row(i), metric, factor, weight.cols, column_sums);
    }
    if (diagonal) return;  // whose weights are symmetric
    for (int64_t j = 0; j < weight.cols; ++j) y.total[j0 + j] += column_sums[j];
  }

  void carry_close(Matrix<T> weight, Matrix<const T> value, int64_t i, int64_t i0,
                   int64_t j0) const {
    const T *values = value.row(i), *bounds = y.bound.data() + j0;
    for (int64_t j = 0; j < weight.cols; ++j) {
      T& w = weight.row(i)[j];
      if (w == 0 || !is_close(metric, values[j], x.bound[i0 + i], bounds[j])) continue;
      const double factor = w * slope<double>(metric, values[j], -2 * gamma);
      w = 0;
      x.add_close(factor, i0 + i, y.rows.given.row(j0 + j));
      // on the diagonal tile the pair comes again, as (j, i)
      if (!(in_batch && i0 == j0)) y.add_close(factor, j0 + j, x.rows.given.row(i0 + i));
    }
  }
};

}  // namespace

template <typename T>
void forward(const Pair<T>& pair, double gamma, const Plane& out) {
  const Rows<T>&x = pair.x, &y = pair.other();
  const auto grid = TileGrid::fitted(x.x.rows, y.x.rows, pair.in_batch());
  const bool direct = out.is_of<T>();
  const Scratch<T> scratch(direct ? 0 : thread_slots() * grid.tile_size());
  const Forward<T> fill{pair, static_cast<T>(gamma)};
  const double ops = 2.0 * grid.tile_size() * (x.x.cols + 8);
  grid.each(ops, [&](const Block& block) {
    const int64_t i0 = block.i0, rows = block.rows, j0 = block.j0, cols = block.cols;
    const auto tile = direct ? out.of<T>().block(i0, rows, j0, cols)
                             : Matrix<T>::contiguous(
                                   scratch.data() + thread_index() * grid.tile_size(), rows, cols);
    gemm<T>(x.x.row_block(i0, rows), y.x.row_block(j0, cols).t(), tile);
    if (is_distance(pair.metric)) fill.values(tile, i0, j0);
    if (block.diagonal) mirror(tile);
    if (!direct) out.write<T>(i0, j0, tile);
    if (!pair.in_batch() || block.diagonal) return;
    if (direct) {
      pairs::loops<T>().transpose(tile, out.of<T>().block(j0, cols, i0, rows));
    } else {
      out.write<T>(j0, i0, tile.t());
    }
  });
}

template <typename T>
void backward(const Pair<T>& pair, double gamma, const Plane& dout, const Plane* out,
              const Matrix<T>* dx, const Matrix<T>* dy) {
  const bool in_batch = pair.in_batch(), distance = is_distance(pair.metric);
  const auto grid = TileGrid::fitted(pair.x.x.rows, pair.other().x.rows, in_batch);
  Gradient<T> x(pair.x, dx, pair.metric, gamma);
  std::optional<Gradient<T>> others;
  if (!in_batch) others.emplace(pair.other(), dy, pair.metric, gamma);
  Gradient<T>& y = in_batch ? x : *others;
  const Backward<T> carry{pair.metric, gamma, in_batch, x, y};
  const int64_t memory = 3 * grid.tile_size();
  const Scratch<T> scratch(thread_slots() * memory);
  const Scratch<double> column_sums(thread_slots() * grid.cols);
  const double ops = 4.0 * grid.tile_size() * (pair.x.x.cols + 8);
  grid.each(ops, [&](const Block& block) {
    const int64_t i0 = block.i0, rows = block.rows, j0 = block.j0, cols = block.cols;
    T* at = scratch.data() + thread_index() * memory;
    const auto weight = Matrix<T>::contiguous(at, rows, cols);
    const auto fetch = [&](const Plane& from, int64_t row0, int64_t n, int64_t col0, int64_t m,
                           T* into) -> Matrix<const T> {
      if (from.is_of<T>()) return from.of<T>().block(row0, n, col0, m);
      const auto copy = Matrix<T>::contiguous(into, n, m);
      from.read<T>(row0, col0, copy);
      return copy;
    };
    T *second = at + grid.tile_size(), *third = second + grid.tile_size();
    move<T>(fetch(dout, i0, rows, j0, cols, second), weight, false);
    if (in_batch) move<T>(fetch(dout, j0, cols, i0, rows, second).t(), weight, true);
    if (distance) {
      carry.weigh(weight, fetch(*out, i0, rows, j0, cols, third), i0, j0,
                  column_sums.data() + thread_index() * grid.cols);
    }
    x.add(weight, y.rows, i0, j0);
    if (!block.diagonal) y.add(weight.t(), x.rows, j0, i0);
  });
  x.finish(pair.metric);
  if (others) others->finish(pair.metric);
}

template void forward<float>(const Pair<float>&, double, const Plane&);
template void forward<double>(const Pair<double>&, double, const Plane&);
template void backward<float>(const Pair<float>&, double, const Plane&, const Plane*,
                              const Matrix<float>*, const Matrix<float>*);
template void backward<double>(const Pair<double>&, double, const Plane&, const Plane*,
                               const Matrix<double>*, const Matrix<double>*);

}  // namespace kdk::pairwise
