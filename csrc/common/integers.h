// SPDX-License-Identifier: Apache-2.0
// Sizes are divided and rounded here. They are not negative.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace kdk {

// Returns a / b, rounded up.
KDK_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns the least multiple of b that is not below a.
KDK_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace kdk
