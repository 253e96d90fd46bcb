// SPDX-License-Identifier: Apache-2.0
// Losses that are sums over pairs or triplets of labelled rows use this one sweep over tiles of
// their distances: a loss weighs the distances of a tile, and the sweep adds up what the weights
// contribute to the gradients of the rows.
//
// Let w be the derivative of the sum by a distance times the slope of that distance. Then the
// gradient of row x_i is (sum_j w_ij) x_i - sum_j w_ij y_j. In batch, only tiles on and above the
// diagonal are multiplied, and each one serves its rows and its columns.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/rows_math.h"
#include "../common/rows_simd.h"
#include "pair_sweep_simd.h"
#include "sorted_rows.h"
#include "tile_grid.h"

namespace kdk::pairs {

// The anchors or the references, and what the sweep adds up for their gradient.
template <typename T>
struct Side {
  const SortedRows<T>& sorted;
  const T* original;  // [n, D], rows in the caller's order, not centred
  bool needed;
  // [n, D] sorted: the sums of the weights times the other rows. They are kept in fp64: with large
  // classes, thousands of terms largely cancel.
  std::optional<Scratch<double>> weighted;
  std::vector<double> weight;  // [n] sorted: sums of the weights

  Side(const SortedRows<T>& rows, const Tensor& x, bool needed_)
      : sorted(rows), original(static_cast<const T*>(x.const_data_ptr())), needed(needed_) {
    if (!needed) return;
    weighted.emplace(rows.size() * rows.x.cols);
    weight.assign(rows.size(), 0.0);
    parallel_each(rows.size(), rows.x.cols,
                  [&](int64_t i) { std::fill_n(weighted_row(i), sorted.x.cols, 0.0); });
  }

  double* weighted_row(int64_t i) const { return weighted->data() + i * sorted.x.cols; }

  const T* row(int64_t i) const { return original + sorted.row[i] * sorted.x.cols; }

  // Returns the gradient [n, D] in the caller's order, or [0] where it is not needed. `more`(i,
  // sum) may subtract contributions from `sum`, which is weighted_row(i) of sorted row i; it takes
  // about `ops` operations.
  template <typename More>
  Tensor gradient(double ops, const More& more) const {
    if (!needed) return empty({0}, scalar_type_of<T>);
    const int64_t n = sorted.size(), D = sorted.x.cols;
    const Tensor dx = empty({n, D}, scalar_type_of<T>);
    auto* out = static_cast<T*>(dx.mutable_data_ptr());
    parallel_each(n, 4.0 * D + ops, [&](int64_t i) {
      more(i, weighted_row(i));
      loops<T>().finish(weight[i], sorted.x.row(i), weighted_row(i), out + sorted.row[i] * D, D);
    });
    return dx;
  }
};

// Returns a gradient of NaN, or [0] where it is not needed.
template <typename T>
Tensor nan_gradient(const Side<T>& side) {
  if (!side.needed) return empty({0}, scalar_type_of<T>);
  const int64_t n = side.sorted.size(), D = side.sorted.x.cols;
  const Tensor dx = empty({n, D}, scalar_type_of<T>);
  std::fill_n(static_cast<T*>(dx.mutable_data_ptr()), n * D, std::numeric_limits<T>::quiet_NaN());
  return dx;
}

template <typename T>
struct Tile {
  int64_t i0, j0;      // first anchor and first reference, in sorted order
  bool both;           // in batch, off the diagonal: the columns are anchors too
  Matrix<T> distance;  // [rows, cols]
  Matrix<T> weight;    // [rows, cols], 0: derivatives by the distances, for the loss to fill in
  Matrix<T> spare;     // [cols, rows]
};

template <typename T>
struct Sweep {
  Labelled<T> rows;
  Side<T> anchors;
  std::optional<Side<T>> others;  // the references where they are not the anchors
  Side<T>& references;
  Distance distance;
  TileGrid grid;
  // The error of a squared distance from products, relative to the squared norms.
  T tolerance = product_tolerance<T>(anchors.sorted.x.cols);
  const Loops<T>& kernels = loops<T>();
  // in batch, [B] sorted: squared norms for `distances_wide`, which is taken where they are there
  std::vector<double> wide_norms;

  // x: [B, D], r: [M, D], both contiguous and in T; in batch, r is x; exclude: [B]
  Sweep(const Tensor& x, const Tensor& labels, const Tensor& r, const Tensor& reference_labels,
        bool in_batch, Distance distance_, bool need_x, bool need_r, const Optional& exclude = {})
      : rows(x, labels, r, reference_labels, in_batch, exclude),
        anchors(rows.anchors, x, need_x),
        others(in_batch ? std::nullopt
                        : std::optional<Side<T>>(std::in_place, rows.references, r, need_r)),
        references(in_batch ? anchors : *others),
        distance(distance_),
        grid(TileGrid::fitted(anchors.sorted.size(), references.sorted.size(), in_batch)) {
    // Rows that are not finite become 0, so that 0 times such a row is 0. A sum that takes a
    // distance to one is NaN all the same.
    blank(rows.anchors);
    if (rows.others) blank(*rows.others);
  }
  Sweep(const Sweep&) = delete;
  Sweep& operator=(const Sweep&) = delete;

  // In batch: distances from norms in fp64.
  void widen_norms() {
    const SortedRows<T>& sorted = anchors.sorted;
    wide_norms.resize(sorted.size());
    parallel_each(sorted.size(), 2.0 * sorted.x.cols, [&](int64_t i) {
      const T* row = sorted.x.row(i);
      wide_norms[i] = sorted.finite(i) ? kdk::rows::loops<T>().dot(row, row, sorted.x.cols)
                                       : std::numeric_limits<double>::quiet_NaN();
    });
  }

  bool in_batch() const { return rows.ranges.in_batch; }
  bool needs_gradient() const { return anchors.needed || references.needed; }

  // Returns the distance that the difference of the rows gives, as the caller gave them.
  double measure(int64_t i, int64_t j) const {
    const double d2 = rows::loops<T>().squared_difference(anchors.row(i), references.row(j),
                                                          anchors.sorted.x.cols);
    return from_squared(d2, distance);
  }
  T from_difference(int64_t i, int64_t j) const { return static_cast<T>(measure(i, j)); }

  // Returns how far the distance d > 0 of a pair may be from the exact one, by the rounding of
  // products.
  T slack(int64_t i, int64_t j, T d) const {
    const T squared = tolerance * (anchors.sorted.norm[i] + references.sorted.norm[j]);
    return distance == Distance::kEuclidean     ? squared / d
           : distance == Distance::kSqEuclidean ? squared
                                                : squared / 2;
  }

  // The loss offers
  //   stretches(i, j0, n, f): f(begin, end) for the columns [0, n) of a tile, whose first one is
  //                           reference j0, that it takes the distance of anchor i to
  //   skips(block): whether it takes none of this tile
  //   weigh(tile): fills in weights; false if all are 0
  // and may keep results per row: no two calls at a time share rows, and each row meets its tiles
  // in an order that depends on the shapes alone.
  template <typename Loss>
  void run(Loss& loss) {
    Workspaces workspaces(*this);
    each_tile([&](const Block& block) {
      if (loss.skips(block)) return;
      Workspace& workspace = workspaces.mine();
      const Tile<T> tile = workspace.tile(*this, block);
      const auto stretches = [&](int64_t i, const auto& f) {
        loss.stretches(block.i0 + i, block.j0, block.cols, f);
      };
      workspace.close.clear();
      measure(tile, stretches, workspace.close);
      if (loss.weigh(tile) && needs_gradient())
        add_gradient(tile, stretches, workspace.close, workspace);
    });
  }

  struct Pair {
    int64_t i, j;  // within a tile
  };

  // The memory that one thread needs for a tile.
  struct Workspace {
    T* memory;     // distances, weights and spare, and a product
    int64_t size;  // of each of the first three
    T* product;    // [max(rows, cols), D]; null where no gradient is needed
    std::vector<Pair> close;
    std::vector<double> column_sums;

    Tile<T> tile(const Sweep& sweep, const Block& block) {
      return {block.i0,
              block.j0,
              sweep.in_batch() && !block.diagonal,
              Matrix<T>::contiguous(memory, block.rows, block.cols),
              Matrix<T>::contiguous(memory + size, block.rows, block.cols),
              Matrix<T>::contiguous(memory + 2 * size, block.cols, block.rows)};
    }
  };

  class Workspaces {
   public:
    explicit Workspaces(const Sweep& sweep)
        : memory_(thread_slots() * elements(sweep)), each_(thread_slots()) {
      const int64_t size = sweep.grid.tile_size();
      T* at = memory_.data();
      for (Workspace& workspace : each_) {
        workspace.memory = at;
        workspace.size = size;
        workspace.product = sweep.needs_gradient() ? at + 3 * size : nullptr;
        workspace.column_sums.resize(sweep.grid.cols);
        at += elements(sweep);
      }
    }
    Workspace& mine() { return each_[thread_index()]; }

   private:
    static int64_t elements(const Sweep& sweep) {
      const TileGrid& grid = sweep.grid;
      const int64_t D = sweep.anchors.sorted.x.cols;
      return 3 * grid.tile_size() +
             (sweep.needs_gradient() ? std::max(grid.rows, grid.cols) * D : 0);
    }

    Scratch<T> memory_;
    std::vector<Workspace> each_;
  };

  // Calls f(block) for every tile, as TileGrid::each does.
  template <typename F>
  void each_tile(const F& f) const {
    grid.each(2.0 * grid.tile_size() * (anchors.sorted.x.cols + 8), f);
  }

  // Fills in the distances of a tile in the stretches(i, f) of each row i, and adds to `close` the
  // pairs whose distance comes from their difference.
  template <typename Stretches>
  void measure(const Tile<T>& tile, const Stretches& stretches, std::vector<Pair>& close) const {
    const auto& d = tile.distance;
    gemm<T>(anchors.sorted.x.row_block(tile.i0, d.rows),
            references.sorted.x.row_block(tile.j0, d.cols).t(), d);
    for (int64_t i = 0; i < d.rows; ++i) {
      std::fill_n(tile.weight.row(i), d.cols, T(0));
      stretches(i, [&](int64_t begin, int64_t end) {
        T* row = d.row(i);
        const int64_t first = tile.j0 + begin, n = end - begin;
        const int64_t found =
            wide_norms.empty()
                ? kernels.distances(row + begin, anchors.sorted.norm[tile.i0 + i],
                                    references.sorted.norm.data() + first, n, distance)
                : kernels.distances_wide(row + begin, wide_norms[tile.i0 + i],
                                         wide_norms.data() + first, n, distance);
        if (found == 0) return;
        for (int64_t j = begin; j < end; ++j) {
          if (!(row[j] < 0)) continue;
          row[j] = from_difference(tile.i0 + i, tile.j0 + j);
          close.push_back({i, j});
        }
      });
    }
  }

  // Adds to the gradients of both sides what the weights of a measured tile contribute, and
  // overwrites the weights.
  template <typename Stretches>
  void add_gradient(const Tile<T>& tile, const Stretches& stretches, const std::vector<Pair>& close,
                    Workspace& workspace) {
    const auto& d = tile.distance;
    for (const Pair& pair : close) add_close(tile, pair);
    double* column_sums = workspace.column_sums.data();
    std::fill_n(column_sums, d.cols, 0.0);
    for (int64_t i = 0; i < d.rows; ++i) {
      double sum = 0;
      stretches(i, [&](int64_t begin, int64_t end) {
        sum += kernels.slopes(d.row(i) + begin, tile.weight.row(i) + begin, column_sums + begin,
                              end - begin, distance);
      });
      if (anchors.needed) anchors.weight[tile.i0 + i] += sum;
    }
    const auto x = anchors.sorted.x.row_block(tile.i0, d.rows),
               y = references.sorted.x.row_block(tile.j0, d.cols);
    if (anchors.needed) add_product(tile.weight, y, anchors, tile.i0, workspace.product);
    if (!references.needed) return;
    for (int64_t j = 0; j < d.cols; ++j) references.weight[tile.j0 + j] += column_sums[j];
    add_product(tile.weight.t(), x, references, tile.j0, workspace.product);
  }

 private:
  static void blank(SortedRows<T>& sorted) {
    for (int64_t i = 0; i < sorted.size(); ++i) {
      if (!sorted.finite(i))
        std::fill_n(sorted.memory.data() + i * sorted.x.cols, sorted.x.cols, T(0));
    }
  }

  void add_product(Matrix<const T> weight, Matrix<const T> other, const Side<T>& side, int64_t i0,
                   T* memory) const {
    gemm<T>(weight, other, Matrix<T>::contiguous(memory, weight.rows, other.cols));
    rows::loops<T>().add_wide(memory, side.weighted_row(i0), weight.rows * other.cols);
  }

  // The difference of close rows would be lost in (sum_j w_ij) x_i - sum_j w_ij y_j.
  void add_close(const Tile<T>& tile, const Pair& pair) {
    T& weight = tile.weight.row(pair.i)[pair.j];
    if (weight == 0) return;
    const int64_t i = tile.i0 + pair.i, j = tile.j0 + pair.j, D = anchors.sorted.x.cols;
    const double factor = weight * slope(tile.distance.row(pair.i)[pair.j], distance);
    weight = 0;
    if (anchors.needed)
      kernels.subtract_difference(factor, anchors.row(i), references.row(j),
                                  anchors.weighted_row(i), D);
    if (references.needed)
      kernels.subtract_difference(factor, references.row(j), anchors.row(i),
                                  references.weighted_row(j), D);
  }
};

}  // namespace kdk::pairs
