// SPDX-License-Identifier: Apache-2.0
// The operators take the strategies by which positives and negatives are chosen by these names.
#pragma once

#include "../common/named.h"

namespace kdk::triplet {

// kPaired is for positives only: row i of the references is the positive of anchor i.
enum class Strategy { kHardest, kSemihard, kEasiest, kPaired };

inline constexpr Named<Strategy> kStrategies[] = {{"hardest", Strategy::kHardest},
                                                  {"semihard", Strategy::kSemihard},
                                                  {"easiest", Strategy::kEasiest},
                                                  {"paired", Strategy::kPaired}};

}  // namespace kdk::triplet
