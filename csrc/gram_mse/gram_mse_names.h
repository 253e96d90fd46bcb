// SPDX-License-Identifier: Apache-2.0
// The operators of gram_mse take options by these names.
#pragma once

#include "../common/named.h"
#include "gram_mse_math.h"

namespace kdk::gram_mse {

inline constexpr Named<Normalize> kNormalizations[] = {{"row_l2", Normalize::kRowL2},
                                                       {"row_l1", Normalize::kRowL1},
                                                       {"feature", Normalize::kFeature},
                                                       {"none", Normalize::kNone}};

inline constexpr Named<Algorithm> kAlgorithms[] = {{"resident", Algorithm::kResident},
                                                   {"streamed", Algorithm::kStreamed},
                                                   {"factored", Algorithm::kFactored}};

// Whether Gram entries go through the Taylor polynomial of the Gaussian kernel.
inline constexpr Named<bool> kTaylorKernels[] = {{"linear", false}, {"rbf_taylor", true}};

}  // namespace kdk::gram_mse
