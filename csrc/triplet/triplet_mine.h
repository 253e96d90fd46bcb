// SPDX-License-Identifier: Apache-2.0
// The miner searches for the positive and the negative of each anchor. In batch, only tiles of
// distances on and above the diagonal are multiplied; each tile serves the anchors of its rows and
// of its columns.
#pragma once

#include <limits>
#include <vector>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "../pairs/pair_sweep_simd.h"
#include "../pairs/sorted_rows.h"
#include "../pairs/tile_grid.h"
#include "triplet_math.h"
#include "triplet_names.h"
#include "triplet_simd.h"

namespace kdk::triplet {

using pairs::kMostTile, pairs::Labelled, pairs::LabelRanges, pairs::SortedRows;

// Candidates of one kind (positives or negatives) that each anchor looks through, and the winners
// so far.
template <typename T>
struct Search {
  bool same_label;
  T sign;                 // +1 looks for the nearest, -1 for the farthest
  std::vector<T> floors;  // keys at or below it do not count; one per anchor, in sorted order
  std::vector<Best<T>> best;

  Search(bool same, bool nearest, int64_t anchors)
      : same_label(same),
        sign(nearest ? T(1) : T(-1)),
        floors(anchors, -std::numeric_limits<T>::infinity()),
        best(anchors, Best<T>{0, -1}) {}
};

template <typename T>
struct Miner {
  const SortedRows<T>& anchors;
  const SortedRows<T>& references;
  const LabelRanges& ranges;
  const Loops<T>& kernels = loops<T>();
  const pairs::Loops<T>& pair_kernels = pairs::loops<T>();

  explicit Miner(const Labelled<T>& rows)
      : anchors(rows.anchors), references(rows.references), ranges(rows.ranges) {}

  void offer(Search<T>& search, int64_t anchor, T key, int64_t reference) const {
    Best<T>& best = search.best[anchor];
    const int64_t row = references.row[reference];
    if (better(key, row, best)) best = {key, row};
  }

  // Looks at one tile of squared distances, of anchors i0... to references j0.... With `both`, in
  // batch, the columns are anchors too.
  void look(Search<T>& search, Matrix<T> d, int64_t i0, int64_t j0, bool both,
            T* column_keys) const {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    if (both) std::fill_n(column_keys, d.cols, kInfinity);
    for (int64_t i = 0; i < d.rows; ++i) {
      const int64_t anchor = i0 + i;
      const T* row = d.row(i);
      const T floor = search.floors[anchor];
      T least = kInfinity;
      ranges.stretches(search.same_label, anchor, j0, d.cols, [&](int64_t begin, int64_t end) {
        least = std::min(
            least, pair_kernels.least_above(row + begin, search.sign, floor,
                                            both ? search.floors.data() + j0 + begin : nullptr,
                                            both ? column_keys + begin : nullptr, end - begin));
      });
      if (least == kInfinity || (search.best[anchor].row >= 0 && least > search.best[anchor].key))
        continue;
      ranges.stretches(search.same_label, anchor, j0, d.cols, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          if (search.sign * row[j] == least) offer(search, anchor, least, j0 + j);
        }
      });
    }
    for (int64_t j = 0; both && j < d.cols; ++j) {
      const int64_t anchor = j0 + j;
      const T least = column_keys[j];
      if (least == kInfinity || (search.best[anchor].row >= 0 && least > search.best[anchor].key))
        continue;
      for (int64_t i = 0; i < d.rows; ++i) {
        if (ranges.same(anchor, i0 + i) == search.same_label && search.sign * d.row(i)[j] == least)
          offer(search, anchor, least, i0 + i);
      }
    }
  }

  void tile(const std::vector<Search<T>*>& searches, const pairs::Block& block, bool both,
            T* memory) const {
    const int64_t i0 = block.i0, n_i = block.rows, j0 = block.j0, n_j = block.cols;
    const auto d = Matrix<T>::contiguous(memory, n_i, n_j);
    gemm<T>(anchors.x.row_block(i0, n_i), references.x.row_block(j0, n_j).t(), d);
    for (int64_t i = 0; i < n_i; ++i)
      kernels.squared_distances(d.row(i), anchors.norm[i0 + i], references.norm.data() + j0, n_j);
    for (Search<T>* search : searches)
      look(*search, d, i0, j0, both, memory + kMostTile * kMostTile);
  }

  void run(const std::vector<Search<T>*>& searches) const {
    const int64_t B = anchors.size(), M = references.size();
    const bool positives_only =
        std::all_of(searches.begin(), searches.end(), [](const auto* s) { return s->same_label; });
    const auto grid = pairs::TileGrid::square(B, M, ranges.in_batch, kMostTile);
    const int64_t memory = kMostTile * (kMostTile + 1);
    const Scratch<T> scratch(thread_slots() * memory);
    const double ops = 2.0 * grid.tile_size() * anchors.x.cols;
    const auto visit = [&](const pairs::Block& block) {
      if (positives_only && (ranges.first[block.i0] >= block.j0 + block.cols ||
                             ranges.last[block.i0 + block.rows - 1] <= block.j0))
        return;  // labels ascend
      tile(searches, block, ranges.in_batch && !block.diagonal,
           scratch.data() + thread_index() * memory);
    };
    if (ranges.in_batch) {
      grid.each(ops, visit);
    } else {
      grid.each_by_rows(ops, visit);
    }
  }

  // Row i of the references is the positive of anchor i.
  void pair(Search<T>& search) const {
    std::vector<int64_t> position(references.size());
    for (int64_t j = 0; j < references.size(); ++j) position[references.row[j]] = j;
    parallel_each(anchors.size(), 4.0 * anchors.x.cols, [&](int64_t i) {
      const int64_t row = anchors.row[i];
      const int64_t j = position[row];
      if (!anchors.finite(i) || !references.finite(j)) {
        search.best[i] = {kNanKey<T>, row};
        return;
      }
      const double d2 = rows::loops<T>().squared_difference(anchors.x.row(i), references.x.row(j),
                                                            anchors.x.cols);
      search.best[i] = {search.sign * static_cast<T>(d2), row};
    });
  }

  // The sweep ignores NaN. Here, each anchor that has a candidate at a distance of NaN chooses it.
  void choose_nan(Search<T>& search) const {
    std::vector<int64_t> bad;
    for (int64_t j = 0; j < references.size(); ++j) {
      if (!references.finite(j)) bad.push_back(j);
    }
    const auto choose = [&](int64_t i, int64_t j) {
      if (ranges.same(i, j) != search.same_label || j == ranges.left_out(i)) return;
      Best<T>& best = search.best[i];
      const int64_t row = references.row[j];
      if (better(kNanKey<T>, row, best)) best = {kNanKey<T>, row};
    };
    for (int64_t i = 0; i < anchors.size(); ++i) {
      if (anchors.finite(i)) {
        for (const int64_t j : bad) choose(i, j);
      } else {
        for (int64_t j = 0; j < references.size(); ++j) choose(i, j);
      }
    }
  }
};

template <typename T>
void mine(const Miner<T>& miner, Strategy positives, Strategy negatives, Search<T>& p,
          Search<T>& n) {
  const bool paired = positives == Strategy::kPaired;
  const auto search = [&](const std::vector<Search<T>*>& searches) {
    miner.run(searches);
    for (Search<T>* each : searches) miner.choose_nan(*each);
  };
  if (paired) miner.pair(p);
  if (positives != Strategy::kSemihard && negatives != Strategy::kSemihard) {
    search(paired ? std::vector{&n} : std::vector{&p, &n});
    return;
  }
  Search<T>& free = positives == Strategy::kSemihard ? n : p;
  Search<T>& bound = positives == Strategy::kSemihard ? p : n;
  if (!paired) search({&free});
  // beyond the other one's distance, in the order that this search looks in
  for (size_t i = 0; i < free.best.size(); ++i) {
    const Best<T>& other = free.best[i];
    bound.floors[i] = other.row < 0             ? std::numeric_limits<T>::infinity()
                      : other.key == kNanKey<T> ? -std::numeric_limits<T>::infinity()
                                                : bound.sign * free.sign * other.key;
  }
  search({&bound});
}

}  // namespace kdk::triplet
