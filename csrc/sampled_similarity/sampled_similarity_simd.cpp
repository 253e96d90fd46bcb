// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
//
// fp-contract: fast, since products are only added up.
#include "sampled_similarity_simd.h"

#include <type_traits>

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

// Vectors of as many narrower numbers as there are lanes of T.
template <typename T>
struct Narrow {
  static constexpr int kCount = Lanes<T>::kCount;
  typedef uint16_t Shorts __attribute__((vector_size(kCount * 2), aligned(2)));
  typedef uint32_t Words __attribute__((vector_size(kCount * 4)));
  typedef float Floats __attribute__((vector_size(kCount * 4), aligned(4)));
};

// Loads as many numbers of the bank.
template <typename T, typename E>
Vector<T> load_wide(const E* p) {
  using Floats = typename Narrow<T>::Floats;
  using Shorts = typename Narrow<T>::Shorts;
  using Words = typename Narrow<T>::Words;
  if constexpr (std::is_same_v<T, E>) {
    return load(p);
  } else if constexpr (std::is_same_v<E, float>) {
    return __builtin_convertvector(*reinterpret_cast<const Floats*>(p), Vector<T>);
  } else {
    const Words bits = __builtin_convertvector(*reinterpret_cast<const Shorts*>(p), Words);
    return __builtin_convertvector((widened<Floats>(E{}, bits)), Vector<T>);
  }
}

template <typename T, typename E>
T widen(E x) {
  if constexpr (std::is_floating_point_v<E>) {
    return x;
  } else {
    return widened<float>(x, static_cast<uint32_t>(x.bits));
  }
}

// Fetches `columns` numbers of a row that is read soon, where there is one: nothing else tells the
// processor where the next row lies.
template <typename E>
void fetch(const E* bank, int64_t stride, const int64_t* index, int64_t k, int64_t n,
           int64_t columns) {
  if (k >= n) return;
  const auto* row = reinterpret_cast<const char*>(bank + index[k] * stride);
  for (int64_t byte = 0; byte < columns * int64_t(sizeof(E)); byte += kLine) {
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
template <int kRows, typename T, typename E>
void dots_of(const T* x, const E* const* rows, int64_t D, T* out) {
  constexpr int kCount = Lanes<T>::kCount;
  Vector<T> sums[kRows] = {};
  int64_t d = 0;
  for (; d + kCount <= D; d += kCount) {
    const Vector<T> of_x = load(x + d);
    for (int r = 0; r < kRows; ++r) sums[r] += of_x * load_wide<T>(rows[r] + d);
  }
  for (int r = 0; r < kRows; ++r) out[r] = sum_of<T>(sums[r]);
  for (; d < D; ++d) {
    for (int r = 0; r < kRows; ++r) out[r] += x[d] * widen<T>(rows[r][d]);
  }
}

template <typename T, typename E>
void dots(const T* x, const E* bank, int64_t stride, const int64_t* index, int64_t n, int64_t D,
          T* out) {
  int64_t k = 0;
  for (; k + kTogether <= n; k += kTogether) {
    const E* rows[kTogether];
    for (int r = 0; r < kTogether; ++r) {
      fetch(bank, stride, index, k + kAhead + r, n, D);
      rows[r] = bank + index[k + r] * stride;
    }
    dots_of<kTogether>(x, rows, D, out + k);
  }
  for (; k < n; ++k) {
    const E* row = bank + index[k] * stride;
    dots_of<1>(x, &row, D, out + k);
  }
}

// Computes `kVectors` vectors of the sum, from column d on.
template <int kVectors, typename T, typename E>
void sum_columns(const T* weights, const E* bank, int64_t stride, const int64_t* index, int64_t n,
                 int64_t d, T* out) {
  constexpr int kCount = Lanes<T>::kCount;
  Vector<T> sums[kVectors] = {};
  for (int64_t k = 0; k < n; ++k) {
    fetch(bank + d, stride, index, k + kAhead, n, kVectors * kCount);
    const E* row = bank + index[k] * stride + d;
    for (int v = 0; v < kVectors; ++v) sums[v] += weights[k] * load_wide<T>(row + v * kCount);
  }
  for (int v = 0; v < kVectors; ++v) {
    *reinterpret_cast<Vector<T>*>(out + d + v * kCount) = sums[v];
  }
}

template <typename T, typename E>
void weighted_sum(const T* weights, const E* bank, int64_t stride, const int64_t* index, int64_t n,
                  int64_t D, T* out) {
  constexpr int kCount = Lanes<T>::kCount;
  int64_t d = 0;
  for (; d + kColumns * kCount <= D; d += kColumns * kCount) {
    sum_columns<kColumns>(weights, bank, stride, index, n, d, out);
  }
  for (; d + kCount <= D; d += kCount) sum_columns<1>(weights, bank, stride, index, n, d, out);
  for (int64_t j = d; j < D; ++j) out[j] = 0;
  for (int64_t k = 0; d < D && k < n; ++k) {
    const E* row = bank + index[k] * stride;
    for (int64_t j = d; j < D; ++j) out[j] += weights[k] * widen<T>(row[j]);
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

template <typename T, typename E>
const Loops<T, E>& loops() {
  static constexpr Loops<T, E> table = {dots<T, E>, weighted_sum<T, E>, all_finite<T>};
  return table;
}

template const Loops<float, float>& loops<float, float>();
template const Loops<float, Half>& loops<float, Half>();
template const Loops<float, BFloat16>& loops<float, BFloat16>();
template const Loops<double, double>& loops<double, double>();
template const Loops<double, float>& loops<double, float>();
template const Loops<double, Half>& loops<double, Half>();
template const Loops<double, BFloat16>& loops<double, BFloat16>();

}  // namespace kdk::sampled_similarity::KDK_SIMD_LEVEL
