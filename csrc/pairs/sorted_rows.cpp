// SPDX-License-Identifier: Apache-2.0
#include "sorted_rows.h"

#include <numeric>

#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "centre.h"

namespace kdk::pairs {

template <typename T>
SortedRows<T>::SortedRows(const Tensor& features, const Tensor& labels)
    : row(features.size(0)),
      label(features.size(0)),
      memory(features.size(0) * features.size(1)),
      norm(features.size(0)) {
  const int64_t n = features.size(0), D = features.size(1);
  const auto* from = static_cast<const T*>(features.const_data_ptr());
  const auto* y = static_cast<const int64_t*>(labels.const_data_ptr());
  std::iota(row.begin(), row.end(), 0);
  std::stable_sort(row.begin(), row.end(), [&](int64_t a, int64_t b) { return y[a] < y[b]; });
  parallel_each(n, 2.0 * D, [&](int64_t i) {
    label[i] = y[row[i]];
    std::copy_n(from + row[i] * D, D, memory.data() + i * D);
    norm[i] = norm_or_nan<T>(from + row[i] * D, D);
  });
  x = Matrix<T>::contiguous(memory.data(), n, D);
}

template <typename T>
void SortedRows<T>::subtract(const std::vector<T>& point) {
  parallel_each(size(), 3.0 * x.cols, [&](int64_t i) {
    if (!finite(i)) return;
    T* to = memory.data() + i * x.cols;
    rows::loops<T>().subtract(to, point.data(), x.cols);
    norm[i] = static_cast<T>(rows::loops<T>().dot(to, to, x.cols));
  });
}

LabelRanges::LabelRanges(const std::vector<int64_t>& anchors,
                         const std::vector<int64_t>& references, bool in_batch_)
    : in_batch(in_batch_), first(anchors.size()), last(anchors.size()) {
  const int64_t n = static_cast<int64_t>(references.size());
  int64_t begin = 0, end = 0;
  for (size_t i = 0; i < anchors.size(); ++i) {
    while (begin < n && references[begin] < anchors[i]) ++begin;
    end = std::max(end, begin);
    while (end < n && references[end] == anchors[i]) ++end;
    first[i] = begin;
    last[i] = end;
  }
}

template <typename T>
Labelled<T>::Labelled(const Tensor& x, const Tensor& labels, const Tensor& r,
                      const Tensor& reference_labels, bool in_batch, const Optional& exclude)
    : anchors(x, torch::stable::contiguous(labels)),
      others(in_batch ? std::nullopt
                      : std::optional<SortedRows<T>>(std::in_place, r,
                                                     torch::stable::contiguous(reference_labels))),
      references(in_batch ? anchors : *others),
      ranges(anchors.label, references.label, in_batch) {
  if (exclude) leave_out(torch::stable::contiguous(*exclude));
  const std::vector<T> centre = centre_of<T>(references.x, references.norm, anchors.norm);
  if (centre.empty()) return;
  anchors.subtract(centre);
  if (others) others->subtract(centre);
}

template <typename T>
void Labelled<T>::leave_out(const Tensor& exclude) {
  const int64_t M = references.size();
  const auto* given = static_cast<const int64_t*>(exclude.const_data_ptr());
  std::vector<int64_t> position(M);
  for (int64_t j = 0; j < M; ++j) position[references.row[j]] = j;
  ranges.excluded.resize(anchors.size());
  for (int64_t i = 0; i < anchors.size(); ++i) {
    const int64_t row = given[anchors.row[i]];
    ranges.excluded[i] = row >= 0 && row < M ? position[row] : -1;
  }
}

template struct SortedRows<float>;
template struct SortedRows<double>;
template struct Labelled<float>;
template struct Labelled<double>;

}  // namespace kdk::pairs
