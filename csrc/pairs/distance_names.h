// SPDX-License-Identifier: Apache-2.0
// Distances by name, as the operators take them.
#pragma once

#include "../common/named.h"
#include "distance_math.h"

namespace kdk::pairs {

inline constexpr Named<Distance> kDistances[] = {{"euclidean", Distance::kEuclidean},
                                                 {"sqeuclidean", Distance::kSqEuclidean},
                                                 {"cosine", Distance::kCosine}};

}  // namespace kdk::pairs
