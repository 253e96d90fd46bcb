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
  T sign;                     // +1 looks for the nearest, -1 for the farthest
  std::vector<T> floors;      // keys at or below it do not count; one per anchor, in sorted order
  std::vector<T> low_floors;  // likewise, but of keys as products give them
  std::vector<Best<T>> best;
  std::vector<T> doubt;  // how far the key of a best one may be off: 0 of one from a difference

  Search(bool same, bool nearest, int64_t anchors)
      : same_label(same),
        sign(nearest ? T(1) : T(-1)),
        floors(anchors, -std::numeric_limits<T>::infinity()),
        best(anchors, Best<T>{0, -1}),
        doubt(anchors, T(0)) {}

  // What the key of a better candidate does not exceed.
  T most(int64_t anchor) const {
    return best[anchor].row < 0 ? std::numeric_limits<T>::infinity()
                                : best[anchor].key + doubt[anchor];
  }
};

// Candidates are ranked by squared distances from products, and where their rounding could decide,
// by those from differences: of rows that lie close together, or at almost the same distance.
template <typename T>
struct Miner {
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  const SortedRows<T>& anchors;
  const SortedRows<T>& references;
  const LabelRanges& ranges;
  const T *given, *given_references;  // rows in the caller's order, not centred
  // of a squared distance from products, relative to the squared norms
  T tolerance = product_tolerance<T>(anchors.x.cols);
  const Loops<T>& kernels = loops<T>();
  const pairs::Loops<T>& pair_kernels = pairs::loops<T>();

  Miner(const Labelled<T>& rows, const T* given_, const T* given_references_)
      : anchors(rows.anchors),
        references(rows.references),
        ranges(rows.ranges),
        given(given_),
        given_references(given_references_) {}

  // The key of a pair from the difference of the rows as they were given; rows in their order.
  T measure(const Search<T>& search, int64_t anchor_row, int64_t reference_row) const {
    const int64_t D = anchors.x.cols;
    return search.sign * static_cast<T>(rows::loops<T>().squared_difference(
                             given + anchor_row * D, given_references + reference_row * D, D));
  }

  // Offers a candidate whose key comes from products.
  void offer(Search<T>& search, int64_t anchor, T key, int64_t reference) const {
    const int64_t row = references.row[reference], anchor_row = anchors.row[anchor];
    const T floor = search.floors[anchor];
    T doubt = tolerance * (anchors.norm[anchor] + references.norm[reference]);
    const auto settle = [&](T& of_key, T& of_doubt, int64_t of_row) {
      if (of_doubt == 0) return;
      of_key = measure(search, anchor_row, of_row);
      of_doubt = 0;
    };
    if (!(key + doubt > floor)) return;
    if (!(key - doubt > floor)) settle(key, doubt, row);
    if (!(key > floor)) return;
    Best<T>& best = search.best[anchor];
    T& best_doubt = search.doubt[anchor];
    if (best.row >= 0) {
      if (key - doubt > best.key + best_doubt) return;
      if (key + doubt >= best.key - best_doubt) {
        settle(key, doubt, row);
        settle(best.key, best_doubt, best.row);
      }
      if (!better(key, row, best)) return;
    }
    best = {key, row};
    best_doubt = doubt;
  }

  static T largest_norm(const SortedRows<T>& rows, int64_t first, int64_t n) {
    T largest = 0;
    for (int64_t i = first; i < first + n; ++i) largest = std::max(largest, rows.norm[i]);
    return largest;  // std::max passes NaN by
  }

  // A row of a tile, whose least key above the low floor is given, and the largest squared norm of
  // its references.
  void look_along(Search<T>& search, int64_t anchor, const T* row, int64_t j0, int64_t n, T least,
                  T largest) const {
    constexpr int64_t kStep = 32;
    const T slack = tolerance * (anchors.norm[anchor] + largest), floor = search.floors[anchor];
    if (!(least < kInfinity && least - slack <= search.most(anchor))) return;
    const auto stretches = [&](const auto& f) {
      ranges.stretches(search.same_label, anchor, j0, n, f);
    };
    if (least <= floor + slack) {  // rounding may take it to the floor: the least one beyond
      least = kInfinity;
      stretches([&](int64_t begin, int64_t end) {
        least = std::min(least, pair_kernels.least_above(row + begin, search.sign, floor + slack,
                                                         nullptr, nullptr, end - begin));
      });
    }
    const T low = floor - slack, bound = std::min(search.most(anchor), least + slack) + slack;
    stretches([&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kStep) {
        const int64_t last = std::min(first + kStep, end);
        if (!pair_kernels.any_key_within(row + first, search.sign, low, bound, last - first))
          continue;
        for (int64_t j = first; j < last; ++j) {
          const T key = search.sign * row[j];
          if (key > low && key <= bound) offer(search, anchor, key, j0 + j);
        }
      }
    });
  }

  // Likewise a column of a tile, whose rows are candidates of its anchor.
  void look_down(Search<T>& search, int64_t anchor, Matrix<T> d, int64_t j, int64_t i0, T least,
                 T largest) const {
    const T slack = tolerance * (anchors.norm[anchor] + largest), floor = search.floors[anchor];
    if (!(least < kInfinity && least - slack <= search.most(anchor))) return;
    const auto each = [&](const auto& f) {
      ranges.stretches(search.same_label, anchor, i0, d.rows, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) f(i0 + i, search.sign * d.row(i)[j]);
      });
    };
    if (least <= floor + slack) {
      least = kInfinity;
      each([&](int64_t, T key) {
        if (key > floor + slack) least = std::min(least, key);
      });
    }
    const T low = floor - slack, bound = std::min(search.most(anchor), least + slack) + slack;
    each([&](int64_t reference, T key) {
      if (key > low && key <= bound) offer(search, anchor, key, reference);
    });
  }

  // Looks at one tile of squared distances, of anchors i0... to references j0.... With `both`, in
  // batch, the columns are anchors too.
  void look(Search<T>& search, Matrix<T> d, int64_t i0, int64_t j0, bool both,
            T* column_keys) const {
    if (both) std::fill_n(column_keys, d.cols, kInfinity);
    const T largest_j = largest_norm(references, j0, d.cols);
    for (int64_t i = 0; i < d.rows; ++i) {
      const int64_t anchor = i0 + i;
      const T* row = d.row(i);
      T least = kInfinity;
      ranges.stretches(search.same_label, anchor, j0, d.cols, [&](int64_t begin, int64_t end) {
        least = std::min(
            least, pair_kernels.least_above(row + begin, search.sign, search.low_floors[anchor],
                                            both ? search.low_floors.data() + j0 + begin : nullptr,
                                            both ? column_keys + begin : nullptr, end - begin));
      });
      look_along(search, anchor, row, j0, d.cols, least, largest_j);
    }
    if (!both) return;
    const T largest_i = largest_norm(anchors, i0, d.rows);
    for (int64_t j = 0; j < d.cols; ++j)
      look_down(search, j0 + j, d, j, i0, column_keys[j], largest_i);
  }

  // Floors for keys that are off by their rounding.
  void lower(Search<T>& search) const {
    const T largest = largest_norm(references, 0, references.size());
    search.low_floors = search.floors;
    for (int64_t i = 0; i < anchors.size(); ++i) {
      search.low_floors[i] -= tolerance * (anchors.norm[i] + largest);
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
    for (Search<T>* search : searches) lower(*search);
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
      search.best[i] = {measure(search, row, row), row};
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
      if (!better(kNanKey<T>, row, best)) return;
      best = {kNanKey<T>, row};
      search.doubt[i] = 0;
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
    Best<T>& other = free.best[i];
    if (free.doubt[i] > 0) other.key = miner.measure(free, miner.anchors.row[i], other.row);
    bound.floors[i] = other.row < 0             ? std::numeric_limits<T>::infinity()
                      : other.key == kNanKey<T> ? -std::numeric_limits<T>::infinity()
                                                : bound.sign * free.sign * other.key;
  }
  search({&bound});
}

}  // namespace kdk::triplet
