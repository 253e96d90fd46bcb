// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
#include "contrastive_simd.h"

#include "contrastive_math.h"

#if !defined(KDK_SIMD_LEVEL)
#error "compile with -DKDK_SIMD_LEVEL=<namespace>"
#endif

namespace kdk::contrastive::KDK_SIMD_LEVEL {
namespace {

template <typename T, bool kSameLabel>
int64_t losses_of(const T* d, T margin, int64_t n, T* weight, double* total) {
  Count<T> nonzero = 0;
  double sum = 0;
#pragma omp simd reduction(+ : nonzero, sum)
  for (int64_t j = 0; j < n; ++j) {
    const T e = misfit(d[j], margin, kSameLabel), loss = e * e / 2;
    nonzero += loss > T(0);
    sum += static_cast<double>(loss);
    weight[j] = kSameLabel ? e : -e;
  }
  *total += sum;
  return nonzero;
}

template <typename T>
int64_t losses(const T* d, T margin, bool same_label, int64_t n, T* weight, double* total) {
  return same_label ? losses_of<T, true>(d, margin, n, weight, total)
                    : losses_of<T, false>(d, margin, n, weight, total);
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static constexpr Loops<T> table = {losses<T>};
  return table;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace kdk::contrastive::KDK_SIMD_LEVEL
