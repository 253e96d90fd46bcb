// SPDX-License-Identifier: Apache-2.0
// rkd measures the distances between the rows of one side tile by tile, above the diagonal, and
// adds to the gradient what weights on them contribute. It uses the sweep over labelled rows, with
// one label for all rows.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/cut.h"
#include "../pairs/pair_sweep.h"

namespace kdk::rkd {

using pairs::Block;

template <typename T>
class Pairs {
 public:
  using Tile = pairs::Tile<T>;

  // x: [B, D], contiguous and in T. If `keep`, [B, B] distances are kept once measured.
  Pairs(const Tensor& x, pairs::Distance distance, bool need, bool keep)
      : sweep_(x, zeros(x.size(0)), x, zeros(x.size(0)), true, distance, need, need),
        workspaces_(sweep_),
        kept_(keep ? x.size(0) * x.size(0) : 0),
        close_(keep ? sweep_.grid.triangle() : 0) {
    sweep_.widen_norms();
  }

  int64_t rows() const { return sweep_.anchors.sorted.size(); }
  Matrix<T> kept() const { return Matrix<T>::contiguous(kept_.data(), rows(), rows()); }

  // Calls f(block) on all cores. No two calls at a time share rows or columns.
  template <typename F>
  void each(const F& f) const {
    sweep_.each_tile(f);
  }

  // Returns the tile of a block, with distances above the diagonal and weights of 0. It belongs to
  // the calling thread until the thread's next tile. Distances are measured unless they are `kept`.
  Tile tile(const Block& block, bool kept) {
    auto& workspace = workspaces_.mine();
    Tile tile = workspace.tile(sweep_, block);
    if (kept_.data() != nullptr)
      tile.distance = this->kept().block(block.i0, block.rows, block.j0, block.cols);
    if (kept && kept_.data() != nullptr) {
      fill_zero(tile.weight);
      return tile;
    }
    auto& close = close_pairs(block);
    close.clear();
    sweep_.measure(tile, stretches(block), close);
    return tile;
  }

  // Adds to the gradient what the weights of a tile contribute. They are derivatives by the
  // distances of pairs of rows, with each pair once.
  void add_gradient(const Block& block, const Tile& tile) {
    sweep_.add_gradient(tile, stretches(block), close_pairs(block), workspaces_.mine());
  }

  Tensor gradient() const {
    return sweep_.anchors.gradient(0, [](int64_t, double*) {});
  }
  Tensor nan_gradient() const { return pairs::nan_gradient(sweep_.anchors); }

 private:
  static Tensor zeros(int64_t n) {
    const Tensor labels = empty({n}, ScalarType::Long);
    std::fill_n(static_cast<int64_t*>(labels.mutable_data_ptr()), n, 0);
    return labels;
  }

  static auto stretches(const Block& block) {
    return [block](int64_t i, const auto& f) {
      if (block.begin(i) < block.cols) f(block.begin(i), block.cols);
    };
  }

  auto& close_pairs(const Block& block) {
    if (close_.empty()) return workspaces_.mine().close;
    return close_[sweep_.grid.triangle_index(block)];
  }

  pairs::Sweep<T> sweep_;
  typename pairs::Sweep<T>::Workspaces workspaces_;
  Scratch<T> kept_;
  std::vector<std::vector<typename pairs::Sweep<T>::Pair>> close_;  // of each tile, if kept
};

}  // namespace kdk::rkd
