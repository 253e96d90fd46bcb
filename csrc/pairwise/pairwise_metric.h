// SPDX-License-Identifier: Apache-2.0
// Metrics by name, as the operators take them.
#pragma once

#include <string>

#include "pairwise_math.h"

namespace kdk::pairwise {

inline Metric parse(const std::string& metric) {
  return metric == "dot"           ? Metric::kDot
         : metric == "cosine"      ? Metric::kCosine
         : metric == "euclidean"   ? Metric::kEuclidean
         : metric == "sqeuclidean" ? Metric::kSqEuclidean
                                   : Metric::kRbf;
}

}  // namespace kdk::pairwise
