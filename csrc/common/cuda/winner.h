// SPDX-License-Identifier: Apache-2.0
// Both glue and kernels know the winners of a search over rows by this type.
#pragma once

namespace kdk::cuda {

// A winner is one number, and the least number wins: its upper half has the order of the key, its
// lower half is the row.
using Winner = unsigned long long;
inline constexpr Winner kNoWinner = ~Winner{0};

}  // namespace kdk::cuda
