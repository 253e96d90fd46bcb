// SPDX-License-Identifier: Apache-2.0
#include "centre.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "../common/integers.h"
#include "../common/parallel.h"
#include "../common/rows_math.h"
#include "../common/rows_simd.h"
#include "../common/stable.h"

namespace kdk::pairs {

template <typename T>
T norm_or_nan(const T* x, int64_t n) {
  const double squared = rows::loops<T>().dot(x, x, n);
  return squared < kNormLimit<T> ? static_cast<T>(squared) : std::numeric_limits<T>::quiet_NaN();
}

template <typename T>
std::vector<T> centre_of(Matrix<const T> x, const std::vector<T>& norm,
                         const std::vector<T>& other_norm, int finer_bits) {
  constexpr int64_t kChunk = 128;  // rows added up by one task; the order of the sum depends on it
  const int64_t n = x.rows, D = x.cols;
  int64_t origin = 0;  // offsets from a row of the set, so that equal rows have their exact mean
  while (origin < n && std::isnan(norm[origin])) ++origin;
  if (origin == n) return {};
  const int64_t chunks = ceil_div(n, kChunk);
  const Scratch<double> partial_sums(chunks * D);
  std::vector<double> squares(chunks, 0.0);
  std::vector<int64_t> counts(chunks, 0);
  parallel_each(chunks, 4.0 * kChunk * D, [&](int64_t chunk) {
    double* sums = partial_sums.data() + chunk * D;
    std::fill_n(sums, D, 0.0);
    for (int64_t i = chunk * kChunk; i < std::min(n, (chunk + 1) * kChunk); ++i) {
      if (std::isnan(norm[i])) continue;
      squares[chunk] += rows::loops<T>().add_offsets(x.row(i), x.row(origin), sums, D);
      ++counts[chunk];
    }
  });
  const double count = std::accumulate(counts.begin(), counts.end(), 0.0);
  std::vector<double> mean(D, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t k = 0; k < D; ++k) mean[k] += partial_sums.data()[chunk * D + k];
  }
  double square = 0;  // of the mean
  double deviation = std::accumulate(squares.begin(), squares.end(), 0.0) / count;
  for (int64_t k = 0; k < D; ++k) {
    mean[k] /= count;
    deviation -= mean[k] * mean[k];
    mean[k] += x.row(origin)[k];
    square += mean[k] * mean[k];
  }
  if (finer_bits > 0 && square < deviation / 16) return {};
  int exponent = 0;
  std::frexp(2 * std::sqrt(std::max(deviation, 0.0) / D), &exponent);
  const double q = deviation > 0 ? std::ldexp(1.0, exponent - finer_bits) : 0;
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
  for (const std::vector<T>* norms : {&norm, &other_norm}) {
    for (const T each : *norms) largest = each > largest ? each : largest;
  }
  const double reach =
      std::sqrt(largest) + std::sqrt(rows::loops<T>().dot(centre.data(), centre.data(), D));
  return reach * reach < kNormLimit<T> ? centre : std::vector<T>{};
}

template float norm_or_nan<float>(const float*, int64_t);
template double norm_or_nan<double>(const double*, int64_t);
template std::vector<float> centre_of<float>(Matrix<const float>, const std::vector<float>&,
                                             const std::vector<float>&, int);
template std::vector<double> centre_of<double>(Matrix<const double>, const std::vector<double>&,
                                               const std::vector<double>&, int);

}  // namespace kdk::pairs
