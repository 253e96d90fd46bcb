// SPDX-License-Identifier: Apache-2.0
// Loops run on torch's threads. A loop inside a loop runs serially, and so do BLAS calls inside a
// loop.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace kdk {

// Work below this many operations costs less than waking a thread.
inline constexpr double kParallelOps = 2e5;

// Calls f(i) for i in [0, n). Each call takes about `ops` operations.
template <typename F>
void parallel_each(int64_t n, double ops, const F& f) {
  const int64_t grain =
      std::max<int64_t>(1, static_cast<int64_t>(kParallelOps / std::max(ops, 1.0)));
  if (n <= grain) {  // also spares the call through the shim, microseconds at small batch
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

inline int64_t thread_index() {
  uint32_t index = 0;
  TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&index));
  return index;
}

// Returns how many pieces of scratch memory a loop started here needs, for thread_index() to choose
// one of. A loop inside a loop runs on the thread of the outer one and under its index, where the
// number of threads may be 1.
inline int64_t thread_slots() {
  return std::max<int64_t>(torch::stable::get_num_threads(), thread_index() + 1);
}

// Calls f(i, j) once for every pair i <= j of n blocks, so that no two calls running at the same
// time share a block: a call may write to rows i and rows j. The pairs of one round are those of a
// round-robin tournament, and rounds follow one another, so each block sees its partners in an
// order that does not depend on the number of threads.
template <typename F>
void parallel_pairs(int64_t n, double ops, const F& f) {
  parallel_each(n, ops, [&](int64_t i) { f(i, i); });
  const int64_t players = n + n % 2;  // an odd one out pairs with a block that does not exist
  for (int64_t round = 0; round < players - 1; ++round) {
    parallel_each(players / 2, ops, [&](int64_t k) {
      const int64_t i = k == 0 ? players - 1 : (round + k) % (players - 1);
      const int64_t j = (round - k + players - 1) % (players - 1);
      if (std::max(i, j) < n) f(std::min(i, j), std::max(i, j));
    });
  }
}

// Calls f(i, j) once for every tile of n x m blocks, so that no two calls running at the same time
// share a row or a column of blocks. Each row and column sees its tiles in an order that does not
// depend on the number of threads.
template <typename F>
void parallel_tiles(int64_t n, int64_t m, double ops, const F& f) {
  const int64_t longer = std::max(n, m), shorter = std::min(n, m);
  for (int64_t round = 0; shorter > 0 && round < longer; ++round) {
    parallel_each(shorter, ops, [&](int64_t k) {
      const int64_t other = (k + round) % longer;
      n < m ? f(k, other) : f(other, k);
    });
  }
}

}  // namespace kdk
