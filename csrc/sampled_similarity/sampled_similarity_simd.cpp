// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
//
// fp-contract: fast, since products are only added up.
#include "sampled_similarity_simd.h"

#include "../common/lanes.h"

namespace kdk::sampled_similarity::KDK_SIMD_LEVEL {
namespace {

using kdk::KDK_SIMD_LEVEL::Lanes;

constexpr int64_t kAhead = 8;  // rows between the one that is fetched and the one that is read
constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int kTogether = 4;   // rows that share a load of x
constexpr int kColumns = 8;    // vectors of a row that are summed in registers at a time

template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
Vector<T> load(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

// Fetches `columns` numbers of a row that is read soon, where there is one: nothing else tells the
// processor where the next row lies.
template <typename T>
void fetch(const T* bank, const int64_t* index, int64_t k, int64_t n, int64_t D, int64_t columns) {
  if (k >= n) return;
  const auto* row = reinterpret_cast<const char*>(bank + index[k] * D);
  for (int64_t byte = 0; byte < columns * int64_t(sizeof(T)); byte += kLine) {
    __builtin_prefetch(row + byte);
  }
}

template <typename T>
T sum_of(Vector<T> lanes) {
  T sum = 0;
  for (int i = 0; i < Lanes<T>::kCount; ++i) sum += lanes[i];
  return sum;
}

// Computes the inner products of x with kRows rows.
template <int kRows, typename T>
void dots_of(const T* x, const T* const* rows, int64_t D, T* out) {
  constexpr int kCount = Lanes<T>::kCount;
  Vector<T> sums[kRows] = {};
  int64_t d = 0;
  for (; d + kCount <= D; d += kCount) {
    const Vector<T> of_x = load(x + d);
    for (int r = 0; r < kRows; ++r) sums[r] += of_x * load(rows[r] + d);
  }
  for (int r = 0; r < kRows; ++r) out[r] = sum_of<T>(sums[r]);
  for (; d < D; ++d) {
    for (int r = 0; r < kRows; ++r) out[r] += x[d] * rows[r][d];
  }
}

template <typename T>
void dots(const T* x, const T* bank, const int64_t* index, int64_t n, int64_t D, T* out) {
  int64_t k = 0;
  for (; k + kTogether <= n; k += kTogether) {
    const T* rows[kTogether];
    for (int r = 0; r < kTogether; ++r) {
      fetch(bank, index, k + kAhead + r, n, D, D);
      rows[r] = bank + index[k + r] * D;
    }
    dots_of<kTogether>(x, rows, D, out + k);
  }
  for (; k < n; ++k) {
    const T* row = bank + index[k] * D;
    dots_of<1>(x, &row, D, out + k);
  }
}

// Computes `kVectors` vectors of the sum, from column d on.
template <int kVectors, typename T>
void sum_columns(const T* weights, const T* bank, const int64_t* index, int64_t n, int64_t D,
                 int64_t d, T* out) {
  constexpr int kCount = Lanes<T>::kCount;
  Vector<T> sums[kVectors] = {};
  for (int64_t k = 0; k < n; ++k) {
    fetch(bank + d, index, k + kAhead, n, D, kVectors * kCount);
    const T* row = bank + index[k] * D + d;
    for (int v = 0; v < kVectors; ++v) sums[v] += weights[k] * load(row + v * kCount);
  }
  for (int v = 0; v < kVectors; ++v) {
    *reinterpret_cast<Vector<T>*>(out + d + v * kCount) = sums[v];
  }
}

template <typename T>
void weighted_sum(const T* weights, const T* bank, const int64_t* index, int64_t n, int64_t D,
                  T* out) {
  constexpr int kCount = Lanes<T>::kCount;
  int64_t d = 0;
  for (; d + kColumns * kCount <= D; d += kColumns * kCount) {
    sum_columns<kColumns>(weights, bank, index, n, D, d, out);
  }
  for (; d + kCount <= D; d += kCount) sum_columns<1>(weights, bank, index, n, D, d, out);
  for (int64_t j = d; j < D; ++j) out[j] = 0;
  for (int64_t k = 0; d < D && k < n; ++k) {
    const T* row = bank + index[k] * D;
    for (int64_t j = d; j < D; ++j) out[j] += weights[k] * row[j];
  }
}

template <typename T>
bool all_finite(const T* x, int64_t n) {
  T sum = 0;  // of zeros, unless a number is not finite
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * T(0);
  return sum == T(0);
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {dots<T>, weighted_sum<T>, all_finite<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::sampled_similarity::KDK_SIMD_LEVEL
