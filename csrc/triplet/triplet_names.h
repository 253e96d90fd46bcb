// SPDX-License-Identifier: Apache-2.0
// How positives and negatives are chosen, by name, as the operators take it.
#pragma once

#include "../common/named.h"

namespace kdk::triplet {

// kPaired, of positives only: row i of the references is the positive of anchor i.
enum class Strategy { kHardest, kSemihard, kEasiest, kPaired };

inline constexpr Named<Strategy> kStrategies[] = {{"hardest", Strategy::kHardest},
                                                  {"semihard", Strategy::kSemihard},
                                                  {"easiest", Strategy::kEasiest},
                                                  {"paired", Strategy::kPaired}};

}  // namespace kdk::triplet
