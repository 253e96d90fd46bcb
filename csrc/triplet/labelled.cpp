// SPDX-License-Identifier: Apache-2.0
#include "labelled.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "../common/parallel.h"
#include "triplet_simd.h"

namespace kdk::triplet {

Distance parse_distance(const std::string& name) {
  return name == "euclidean"     ? Distance::kEuclidean
         : name == "sqeuclidean" ? Distance::kSqEuclidean
                                 : Distance::kCosine;
}

namespace {

template <typename T>
T norm_or_nan(double squared) {
  return squared < kNormLimit<T> ? static_cast<T>(squared) : std::numeric_limits<T>::quiet_NaN();
}

// A point that the references lie around; empty where that is 0 or cannot be subtracted safely.
//
// |x|^2 + |y|^2 - 2 <x, y> rounds relative to the squared norms, so rows that lie close together
// far from 0, as in a batch that has collapsed, would lose their distances; and distances do not
// change when a point is subtracted from all rows. With s the root mean square deviation of an
// element from its mean, the point is the mean in multiples of the power of two q in (2 s, 4 s].
// What is left of the mean is at most q / 2 <= 2 s per element, so squared norms are on average
// within 5 times the squared deviations. Rows around 0 (means below s) are not moved, and in rows
// of few bits, such as whole numbers, equal distances stay equal, since the products of multiples
// of q are exact.
template <typename T>
std::vector<T> centre_of(const Sorted<T>& anchors, const Sorted<T>& references) {
  constexpr int64_t kChunk = 128;  // rows added up by one task; the order of the sum depends on it
  const int64_t n = references.size(), D = references.x.cols;
  int64_t origin = 0;  // offsets from a row of the set, so that equal rows have their exact mean
  while (origin < n && !references.finite(origin)) ++origin;
  if (origin == n) return {};
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const Scratch<double> partial_sums(chunks * D);
  std::vector<double> squares(chunks, 0.0);
  std::vector<int64_t> counts(chunks, 0);
  parallel_each(chunks, 4.0 * kChunk * D, [&](int64_t chunk) {
    double* sums = partial_sums.data() + chunk * D;
    std::fill_n(sums, D, 0.0);
    for (int64_t i = chunk * kChunk; i < std::min(n, (chunk + 1) * kChunk); ++i) {
      if (!references.finite(i)) continue;
      squares[chunk] +=
          loops<T>().add_offsets(references.x.row(i), references.x.row(origin), sums, D);
      ++counts[chunk];
    }
  });
  const double count = std::accumulate(counts.begin(), counts.end(), 0.0);
  std::vector<double> mean(D, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t k = 0; k < D; ++k) mean[k] += partial_sums.data()[chunk * D + k];
  }
  double deviation = std::accumulate(squares.begin(), squares.end(), 0.0) / count;
  for (int64_t k = 0; k < D; ++k) {
    mean[k] /= count;
    deviation -= mean[k] * mean[k];
    mean[k] += references.x.row(origin)[k];
  }
  int exponent = 0;
  std::frexp(2 * std::sqrt(std::max(deviation, 0.0) / D), &exponent);
  const double q = deviation > 0 ? std::ldexp(1.0, exponent) : 0;
  std::vector<T> centre(D);
  bool moves = false;
  for (int64_t k = 0; k < D; ++k) {
    const double steps = mean[k] / q;
    // q may be finer than the mean's own digits
    const bool coarse = std::abs(steps) < 1 / std::numeric_limits<double>::epsilon();
    centre[k] = static_cast<T>(coarse ? std::nearbyint(steps) * q : mean[k]);
    moves = moves || centre[k] != 0;
  }
  if (!moves) return {};
  double largest = 0;
  for (const Sorted<T>* rows : {&anchors, &references}) {
    for (const T norm : rows->norm) largest = norm > largest ? norm : largest;
  }
  const double reach = std::sqrt(largest) + std::sqrt(loops<T>().squared_norm(centre.data(), D));
  return reach * reach < kNormLimit<T> ? centre : std::vector<T>{};
}

}  // namespace

template <typename T>
Sorted<T>::Sorted(const Tensor& features, const Tensor& labels)
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
    norm[i] = norm_or_nan<T>(loops<T>().squared_norm(from + row[i] * D, D));
  });
  x = Matrix<T>::contiguous(memory.data(), n, D);
}

template <typename T>
void Sorted<T>::subtract(const std::vector<T>& point) {
  parallel_each(size(), 3.0 * x.cols, [&](int64_t i) {
    if (!finite(i)) return;
    T* to = memory.data() + i * x.cols;
    loops<T>().subtract(to, point.data(), x.cols);
    norm[i] = static_cast<T>(loops<T>().squared_norm(to, x.cols));
  });
}

LabelRanges::LabelRanges(const std::vector<int64_t>& anchors,
                         const std::vector<int64_t>& references, bool own_)
    : own(own_), first(anchors.size()), last(anchors.size()) {
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
                      const Tensor& reference_labels, bool own)
    : anchors(x, torch::stable::contiguous(labels)),
      others(own ? std::nullopt
                 : std::optional<Sorted<T>>(std::in_place, r,
                                            torch::stable::contiguous(reference_labels))),
      references(own ? anchors : *others),
      ranges(anchors.label, references.label, own) {
  const std::vector<T> centre = centre_of(anchors, references);
  if (centre.empty()) return;
  anchors.subtract(centre);
  if (others) others->subtract(centre);
}

template struct Sorted<float>;
template struct Sorted<double>;
template struct Labelled<float>;
template struct Labelled<double>;

}  // namespace kdk::triplet
