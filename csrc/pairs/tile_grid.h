// SPDX-License-Identifier: Apache-2.0
// A matrix of pairs has the rows of one side as its rows and those of the other side as its
// columns, and is cut into tiles. In batch both sides are one. Then one half of the matrix tells
// the other, and the grid has the tiles on and above the diagonal only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/integers.h"
#include "../common/parallel.h"

namespace kdk::pairs {

// Most rows and columns of a tile: with its operands it stays in a core's L2.
inline constexpr int64_t kMostTile = 256;

// One tile: rows i0 ... i0 + rows - 1 and columns j0 ... j0 + cols - 1.
struct Block {
  int64_t i0, rows, j0, cols;
  bool diagonal;  // in batch: the columns are the rows

  // Columns of row i of the tile before those above the diagonal.
  int64_t begin(int64_t i) const { return diagonal ? i + 1 : 0; }
};

struct TileGrid {
  int64_t N, M;  // rows and columns of the matrix
  bool in_batch;
  int64_t rows, cols;  // of all tiles but the last ones

  // Cuts the matrix into square tiles of one size.
  static TileGrid square(int64_t N, int64_t M, bool in_batch, int64_t tile) {
    return {N, M, in_batch, tile, tile};
  }

  // Cuts the matrix into tiles that are smaller where the matrix is small, so that all cores get
  // some.
  static TileGrid fitted(int64_t N, int64_t M, bool in_batch) {
    const auto fit = [](int64_t n, int64_t least) {
      return std::clamp(round_up(n / 8, 32), least, kMostTile);
    };
    const int64_t rows = fit(N, in_batch ? 64 : 32);
    return {N, M, in_batch, rows, in_batch ? rows : fit(M, 64)};
  }

  int64_t tile_size() const { return rows * cols; }
  int64_t down() const { return ceil_div(N, rows); }
  int64_t across() const { return ceil_div(M, cols); }

  // In batch, these return how many tiles there are, and the number of one of them.
  int64_t triangle() const { return down() * (down() + 1) / 2; }
  int64_t triangle_index(const Block& block) const {
    const int64_t ti = block.i0 / rows, tj = block.j0 / cols;
    return tj * (tj + 1) / 2 + ti;
  }

  // Calls f(block) for each tile, on all cores. A call takes about `ops` operations. No two calls
  // that run at the same time share rows or columns, and rows and columns meet their tiles in an
  // order that depends on the sizes alone.
  template <typename F>
  void each(double ops, const F& f) const {
    const auto visit = [&](int64_t ti, int64_t tj) { f(block(ti, tj)); };
    if (in_batch) {
      parallel_pairs(down(), ops, visit);
    } else {
      parallel_tiles(down(), across(), ops, visit);
    }
  }

  // Does the same, but visits the tiles of the same rows one after another on one core, so that two
  // calls may share columns. Not for a grid in batch.
  template <typename F>
  void each_by_rows(double ops, const F& f) const {
    parallel_each(down(), ops * across(), [&](int64_t ti) {
      for (int64_t tj = 0; tj < across(); ++tj) f(block(ti, tj));
    });
  }

 private:
  Block block(int64_t ti, int64_t tj) const {
    const int64_t i0 = ti * rows, j0 = tj * cols;
    return {i0, std::min(rows, N - i0), j0, std::min(cols, M - j0), in_batch && ti == tj};
  }
};

}  // namespace kdk::pairs
