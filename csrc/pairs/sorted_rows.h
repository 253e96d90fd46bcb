// SPDX-License-Identifier: Apache-2.0
// Losses over labelled rows put the rows into the order of their labels, and ask which of them are
// candidates of an anchor.
//
// Rows of one label lie next to each other, so a row of a tile is one stretch of positives between
// two of negatives, and no label is compared.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/stable.h"

namespace kdk::pairs {

// Rows in the order of their labels. A point common to anchors and references is subtracted from
// them.
template <typename T>
struct SortedRows {
  std::vector<int64_t> row;    // original row
  std::vector<int64_t> label;  // ascending
  Scratch<T> memory;
  Matrix<const T> x;    // [n, D], contiguous
  std::vector<T> norm;  // squared; NaN where the row is not finite, which makes its distances NaN

  // features: [n, D] in T, labels: [n]; both contiguous
  SortedRows(const Tensor& features, const Tensor& labels);
  void subtract(const std::vector<T>& point);  // [D]
  bool finite(int64_t i) const { return !std::isnan(norm[i]); }
  int64_t size() const { return static_cast<int64_t>(row.size()); }
};

// For each anchor, the references that have its label. Both are in sorted order.
struct LabelRanges {
  bool in_batch;                     // the references are the anchors: none is its own positive
  std::vector<int64_t> first, last;  // of each anchor: references [first, last)
  // The reference that each anchor leaves out, or -1; empty where none does, and in batch.
  std::vector<int64_t> excluded;

  LabelRanges(const std::vector<int64_t>& anchors, const std::vector<int64_t>& references,
              bool in_batch);

  // Returns whether reference j has the label of anchor i, which is also true of the anchor itself.
  bool same(int64_t i, int64_t j) const { return j >= first[i] && j < last[i]; }

  // Returns the reference that anchor i is not compared with, or -1.
  int64_t left_out(int64_t i) const { return in_batch ? i : excluded.empty() ? -1 : excluded[i]; }

  // Calls f(from, to) for the stretches of columns [begin, end) of a tile, whose first one is
  // reference j0, that anchor i is compared with.
  template <typename F>
  void compared(int64_t i, int64_t j0, int64_t begin, int64_t end, const F& f) const {
    const int64_t self = left_out(i) - j0;
    if (self < begin || self >= end) {
      if (begin < end) f(begin, end);
      return;
    }
    if (begin < self) f(begin, self);
    if (self + 1 < end) f(self + 1, end);
  }

  // Calls f(begin, end) for the stretches of columns [0, n) of a tile, whose first one is reference
  // j0, that hold the positives (same_label) or the negatives of anchor i.
  template <typename F>
  void stretches(bool same_label, int64_t i, int64_t j0, int64_t n, const F& f) const {
    const int64_t begin = std::clamp<int64_t>(first[i] - j0, 0, n),
                  end = std::clamp<int64_t>(last[i] - j0, 0, n);
    if (same_label) return compared(i, j0, begin, end, f);
    compared(i, j0, 0, begin, f);
    compared(i, j0, end, n, f);
  }
};

// The anchors and the references of one call, which are the same rows in batch.
template <typename T>
struct Labelled {
  SortedRows<T> anchors;
  std::optional<SortedRows<T>> others;  // the references where they are not the anchors
  const SortedRows<T>& references;
  LabelRanges ranges;

  // x: [B, D], r: [M, D], both contiguous and in T; labels: [B] and [M], exclude: [B], any stride
  Labelled(const Tensor& x, const Tensor& labels, const Tensor& r, const Tensor& reference_labels,
           bool in_batch, const Optional& exclude);
  Labelled(const Labelled&) = delete;
  Labelled& operator=(const Labelled&) = delete;

 private:
  void leave_out(const Tensor& exclude);
};

extern template struct SortedRows<float>;
extern template struct SortedRows<double>;
extern template struct Labelled<float>;
extern template struct Labelled<double>;

}  // namespace kdk::pairs
