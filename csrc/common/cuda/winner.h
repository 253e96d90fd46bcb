// SPDX-License-Identifier: Apache-2.0
// Winners of a search over rows, as glue and kernels both know them.
#pragma once

namespace kdk::cuda {

// A winner as one number, of which the least wins: its key in an order of unsigned integers above,
// the row below.
using Winner = unsigned long long;
inline constexpr Winner kNoWinner = ~Winner{0};

}  // namespace kdk::cuda
