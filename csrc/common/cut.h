// SPDX-License-Identifier: Apache-2.0
// A sweep over tiles of a large matrix is shared among cores so: the blocks of one axis are tasks,
// and a task goes along the other axis, which is cut into pieces where there are few blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "integers.h"
#include "matrix.h"

namespace kdk {

// The cut depends on the shapes alone, so that sums over pieces do not change with the number of
// threads.
struct Cut {
  static constexpr int64_t kTasks = 16;  // at least, where the shapes have so many blocks
  int64_t blocks, pieces, steps;         // steps: blocks of the other axis in a piece

  Cut(int64_t blocks_, int64_t other_blocks) : blocks(blocks_) {
    const int64_t wanted = std::clamp<int64_t>(ceil_div(kTasks, std::max<int64_t>(blocks, 1)), 1,
                                               std::max<int64_t>(other_blocks, 1));
    steps = ceil_div(std::max<int64_t>(other_blocks, 1), wanted);
    pieces = ceil_div(std::max<int64_t>(other_blocks, 1), steps);
  }
};

template <typename T>
void fill_zero(Matrix<T> m) {
  for (int64_t i = 0; i < m.rows; ++i) std::fill_n(m.row(i), m.cols, T(0));
}

}  // namespace kdk
