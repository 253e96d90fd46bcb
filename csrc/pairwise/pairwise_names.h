// SPDX-License-Identifier: Apache-2.0
// The operators take metrics by these names.
#pragma once

#include "../common/named.h"
#include "pairwise_math.h"

namespace kdk::pairwise {

inline constexpr Named<Metric> kMetrics[] = {{"dot", Metric::kDot},
                                             {"cosine", Metric::kCosine},
                                             {"euclidean", Metric::kEuclidean},
                                             {"sqeuclidean", Metric::kSqEuclidean},
                                             {"rbf", Metric::kRbf}};

}  // namespace kdk::pairwise
