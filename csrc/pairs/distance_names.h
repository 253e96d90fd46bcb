// SPDX-License-Identifier: Apache-2.0
// The operators take distances by these names.
#pragma once

#include "../common/named.h"
#include "distance_math.h"

namespace kdk::pairs {

inline constexpr Named<Distance> kDistances[] = {{"euclidean", Distance::kEuclidean},
                                                 {"sqeuclidean", Distance::kSqEuclidean},
                                                 {"cosine", Distance::kCosine}};

}  // namespace kdk::pairs
